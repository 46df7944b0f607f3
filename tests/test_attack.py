"Attacks by careless and hostile users: the fast ones, and some slow ones; nbs/_dev/attack.py tries all"
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'nbs'/'_dev'))
import attack_inputs, attack_runs, attack_servers
from attacking import GROUPS, Kit, attempt

# How many of a slow group are left out for each that is tried here; the others of these groups take longer
STEP = {'hostile servers': 12, 'closed pipes': 20, 'records cut at many bytes': 20,
        'readers of damaged runs': 20,
        'reward code': 12, 'lora files': 7, 'full disks': 20, 'folders of models': 24, 'edited records': 30,
        'damaged checkpoints': 11, 'prompts': 12, 'signals': 12, 'surroundings': 15}


@pytest.fixture(scope='module')
def kit(tmp_path_factory): return Kit(tmp_path_factory.mktemp('kit'))


@pytest.mark.parametrize('name', [n for n, (_, slow) in GROUPS.items() if not slow])
def test_fast_attacks(kit, name):
    failed = {what: why for what, attack in GROUPS[name][0]() if (why := attempt(attack, kit))}
    assert not failed


SOME = [pytest.param(attack, id=f'{n}: {what}') for n, k in STEP.items()
        for what, attack in list(GROUPS[n][0]())[k//2::k]]

@pytest.mark.parametrize('attack', SOME)
def test_some_slow_attacks(kit, attack): assert attempt(attack, kit) == ''
