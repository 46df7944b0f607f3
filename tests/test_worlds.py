"Every world keeps its promises, and the exam of Shapes its bounds"
import os, subprocess, sys
from pathlib import Path
import pytest, torch
from diffusion_sharpening.worlds.world import (
    WORLDS, check_world, model_path, weight_folders, weights, world_of)

each_world = pytest.mark.parametrize('world', WORLDS.values(), ids=WORLDS)

@each_world
def test_a_world_keeps_its_promises(world): check_world(world, 48)

@each_world
def test_its_models_are_found_by_name_and_by_folder(world):
    for name, folder in world.models.items():
        assert world_of(name) is world and world_of(weights(folder)) is world
        assert model_path(name) == str(weights(folder))

@each_world
def test_groups_split_scores(world):
    _, texts = world.pairs(18, 0)
    parts = world.by_group(torch.arange(18.), texts)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(18))

def test_names_outside_any_world_stay():
    assert world_of('nobody/nothing') is None and model_path('nobody/nothing') == 'nobody/nothing'

def test_the_named_folder_comes_first(tmp_path, monkeypatch):
    (tmp_path/'shapes-clip').mkdir()
    monkeypatch.setenv('DIFFUSION_SHARPENING_DATA', str(tmp_path))
    assert weights('shapes-clip') == tmp_path/'shapes-clip'
    assert weights('shapes-sdxl').parent == weight_folders()[1]
    with pytest.raises(ValueError, match="'nothing' in .*there are: .*shapes-clip"): weights('nothing')
