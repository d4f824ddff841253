"""The bar that counts tokens."""

from tqdm.auto import tqdm


def token_bar(tokens: int, title: str, progress: bool) -> tqdm:
    """Return a bar over so many tokens, which is drawn anew with every update that comes half a second after another.

    Update it per layer, by the layer's share of the tokens: one batch of a large model may take minutes.
    """
    return tqdm(
        total=tokens, unit="token", unit_scale=True, desc=title, disable=not progress, mininterval=0.5, miniters=0
    )
