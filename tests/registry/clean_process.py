"""Load saved models with their own code, where this package cannot be imported, and compare their outputs.

python tests/registry/clean_process.py FOLDER ... > outcomes.json
"""

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.modules["moefy_hf"] = None  # type: ignore[assignment]  # an import of it fails

import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_registry import first_output  # noqa: E402


def outcome(folder: Path) -> bool | str:
    expected = torch.load(folder / "expected.pt")
    auto = getattr(transformers, expected["auto"])
    try:
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        if type(model).__module__.split(".")[0] != "transformers_modules":
            return f"loads as a {type(model).__name__} of {type(model).__module__}"
        now, before = first_output(model.get_submodule(expected["part"]), expected["batch"]), expected["output"]
        finite = before.isfinite()
        apart = float((now - before)[finite].abs().max() / before[finite].abs().max())
        return apart <= 1e-5 or f"differs by {apart:.1e} of the scale"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    print(json.dumps({folder: outcome(Path(folder)) for folder in sys.argv[1:]}))
