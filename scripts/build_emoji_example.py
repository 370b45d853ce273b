"""Rebuild the pictures of `config/examples/emoji` from their npm packages.

    python scripts/build_emoji_example.py

Needs `npm` and Pillow. Pictures are 3D Fluent Emoji at 128 px with their transparent background:
those in `data/` have the caption beside them that they are trained with; those in `held_out/` are
only looked at and measured with. All are emoji that the base model knows in another style.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES = "emojibase-data@17.0.0"
SIZE_PX = 128
EXAMPLE = Path(__file__).resolve().parents[1] / "config" / "examples" / "emoji"
CAPTION = "a 3D emoji of {}"


# Names as emojibase has them, each with the article that a sentence needs. The base model learns
# every second of them (scripts/emoji_base/pictures.py).
CONCEPTS = """
a monkey face, a gorilla, a dog face, a poodle, a wolf, a fox, a raccoon, a cat face, a lion,
a tiger face, a horse face, a moose, a unicorn, a zebra, a bison, a cow face, a pig face, a ram,
a llama, a giraffe, an elephant, a rhinoceros, a hippopotamus, a mouse face, a hamster,
a rabbit face, a hedgehog, a bear, a koala, a panda, an otter, a kangaroo, a turkey, a rooster,
a baby chick, a penguin, a duck, an owl, a flamingo, a parrot, a frog, a crocodile, a turtle,
a snake, a whale, a dolphin, an octopus, a crab, a butterfly, a honeybee, a lady beetle, a snail,
a shark, a sunflower, a tulip, a rose, a cactus, a palm tree, an evergreen tree, a mushroom,
a maple leaf, grapes, a watermelon, a lemon, a banana, a pineapple, a red apple, a pear, cherries,
a strawberry, a kiwi fruit, an avocado, an eggplant, a carrot, broccoli, a croissant, a pretzel,
a cheese wedge, a hamburger, french fries, a pizza, a hot dog, a taco, popcorn, sushi,
soft ice cream, a doughnut, a cookie, a birthday cake, a lollipop, a hot beverage, a castle, a tent,
a ferris wheel, a locomotive, a bus, an ambulance, a fire engine, a police car, a taxi,
an automobile, a tractor, a bicycle, a sailboat, an airplane, a helicopter, a rocket,
a flying saucer, a snowman, fire, a rainbow, a soccer ball, a basketball, a teddy bear,
a jack-o-lantern, a balloon, a wrapped gift, a trophy, a crown, a guitar, a trumpet, a camera,
a light bulb, a key, a bell, an umbrella, a magnet, an alarm clock
"""


def main() -> None:
    """Fetch both packages and write a picture of each concept, with a caption or held out."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = npm_package(PICTURES, Path(folder, "pictures"))
        names = npm_package(NAMES, Path(folder, "names"))
        entries = json.loads((names / "en" / "data.json").read_text(encoding="utf-8"))
        hexcodes = {entry["label"]: entry["hexcode"].lower() for entry in entries}
        for name, phrases in parts().items():
            target = EXAMPLE / name
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for phrase in phrases:
                label = re.sub(r"^an? ", "", phrase)
                picture = Image.open(picture_of(pictures, hexcodes[label])).convert("RGBA")
                stem = target / label.replace(" ", "-")
                small = picture.resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS)
                small.save(stem.with_suffix(".webp"), quality=80, method=6)
                caption = CAPTION.format(phrase)
                stem.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
            size = sum(file.stat().st_size for file in target.iterdir())
            print(f"{len(phrases)} pictures, {size:,} bytes in {target}")


def parts() -> dict[str, list[str]]:
    """The concepts of each folder: three of eight are trained on, the others are held out."""
    known = [" ".join(phrase.split()) for phrase in CONCEPTS.split(",")][::2]
    trained = [phrase for number, phrase in enumerate(known) if number % 8 in (0, 3, 6)]
    return {"data": trained, "held_out": [phrase for phrase in known if phrase not in trained]}


def npm_package(package: str, folder: Path) -> Path:
    """The unpacked package, fetched into `folder` by npm."""
    folder.mkdir()
    pack = ["npm", "pack", package, "--silent", "--pack-destination", str(folder)]
    subprocess.run(pack, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / "package"


def picture_of(pictures: Path, hexcode: str) -> Path:
    """The picture of a code point; some are named with the variation selector, some without."""
    bare = hexcode.removesuffix("-fe0f")
    for name in (hexcode, bare, f"{bare}-fe0f"):
        if (path := pictures / "assets" / f"{name}.webp").exists():
            return path
    raise SystemExit(f"{PICTURES} has no picture of {hexcode}")


if __name__ == "__main__":
    main()
