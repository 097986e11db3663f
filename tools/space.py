"""Make a folder for a Space, the kind of page on Hugging Face where people try a model.

    python tools/space.py out/my-model out/my-space
    python tools/space.py out/my-model out/my-space --model me/my-model     link to the model on the Hub

The folder holds

    app.py              the page (tools/hf/app.py), which runs on any machine: python out/my-space/app.py
    requirements.txt    what it needs
    README.md           the settings of the Space
    model/              the exported model, as tools/export_hf.py wrote it
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, SpaceCardData

APP = Path(__file__).resolve().parent / "hf" / "app.py"

# The page was tried with these, and with gradio 6.18 and transformers 5.0 together. Gradio before 6.17 fetches parts of
# every page from elsewhere.
GRADIO_VERSION = "6.31.0"
PYTHON_VERSION = "3.11"
REQUIREMENTS = """\
gradio>=6.18
sentencepiece>=0.2.2
torch>=2.11
transformers>=5
"""


def space_card(model: Path, hub_model: str) -> str:
    """README.md of the Space. Hugging Face reads its front matter."""
    card = ModelCard.load(model / "README.md")
    name = card.data.model_name or model.resolve().name
    settings = SpaceCardData(
        title=name,
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version=PYTHON_VERSION,
        app_file=APP.name,
        license=card.data.license,
        models=[hub_model] if hub_model else None,
    )
    return f"""---
{settings.to_yaml()}
---

# {name}

A page to try the model in the folder `model`, with its card beside it. It runs on any machine too:

```bash
pip install -r requirements.txt
python app.py
```
"""


def make_space(model: Path, space: Path, hub_model: str = "") -> None:
    """Write the Space, which must not exist. Raises OSError or ValueError, naming the folder and what to do."""
    for name in ("config.json", "README.md"):
        if not (model / name).is_file():
            raise FileNotFoundError(f"{model} has no {name}: name a folder that tools/export_hf.py wrote")
    if space.exists():
        raise FileExistsError(f"{space} exists already: name another folder, or remove it")

    space.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=space.parent, prefix=f".{space.name}-") as unfinished:
        folder = Path(unfinished) / "space"
        shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(APP, folder / APP.name)
        (folder / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
        (folder / "README.md").write_text(space_card(model, hub_model), encoding="utf-8")
        folder.rename(space)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="DIR", help="a folder that tools/export_hf.py wrote")
    parser.add_argument("space", type=Path, metavar="SPACE", help="to be written; must not exist")
    parser.add_argument("--model", dest="hub_model", default="", metavar="USER/NAME", help="of the model on the Hub")
    args = parser.parse_args(argv)
    try:
        make_space(args.model, args.space, args.hub_model)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    n_bytes = sum(file.stat().st_size for file in args.space.rglob("*") if file.is_file())
    print(f"{args.space}: {n_bytes:,} bytes")
    print(f"Try it:     pip install -r {args.space}/requirements.txt && python {args.space}/app.py")
    print(f"Upload it:  hf auth login && hf upload YOUR_NAME/{args.space.name} {args.space} . --repo-type space")


if __name__ == "__main__":
    main()
