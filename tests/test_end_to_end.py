"All commands after one another, from a folder with a model of 128 px to a LoRA in other tools"
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'nbs'/'_dev'))
from attacking import Child
from end_to_end import end_to_end


def test_end_to_end(tmp_path):
    "Forked, for speed; `python nbs/_dev/end_to_end.py` runs every command in a process of its own"
    end_to_end(tmp_path, Child)
