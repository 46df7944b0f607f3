"Widgets without a browser: what a person decides is what a training reads, and no answer is lost"
import json
import pytest
import torch
from diffusion_sharpening.commands.train import train
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.widgets.curation import Curation
from diffusion_sharpening.widgets.explorer import BRANCHES, explore, winners
from diffusion_sharpening.widgets.study import Study, sampled, save_choices, tally
from shared import PROMPTS, Bright, go

def test_answers_train_d3po(made, tmp_path):
    "A study of seeds, answered, is what `d3po` with its human preset learns from"
    study = Study([(p, 2*i, 2*i + 1) for i, p in enumerate(PROMPTS)], tmp_path/'answers.jsonl')
    for side in ('left', 'right', 'tie', 'left'): study.answer(side)
    assert save_choices(study, tmp_path/'choices.jsonl') == 3
    go(made, 'd3po', tmp_path/'run', 1, preset='human', images=str(tmp_path/'choices.jsonl'))
    assert json.loads((tmp_path/'run'/'report.json').read_text())['steps'] == 1

def test_accepted_samples_train(made, tmp_path):
    "A curated folder is what `standard --images` learns from"
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mine = Curation(PROMPTS, pictures, tmp_path/'accepted')
    for i in (0, 2, 3): mine.mark(i, True)
    mine.mark(3, False)
    train('standard', model=str(made/'xl'), images=str(tmp_path/'accepted'), out=str(tmp_path/'run'), steps=1,
          reward=f'{made}/mine.py:bright', prompts=str(made/'prompts.txt'), heldout=0, batch=2, rank=2)
    assert json.loads((tmp_path/'run'/'report.json').read_text())['steps'] == 1

def test_the_judged_sample_is_the_one_learned_from(made):
    "The picture of a seed is the picture of the same sample among others"
    model = Denoiser.from_pretrained(made/'xl', guidance=1., device='cpu')
    look = sampled(model, S=3)
    assert look(PROMPTS[0], 5) == look(PROMPTS[0], 5) != look(PROMPTS[0], 6)

@pytest.mark.parametrize('text', ['nonsense\n', '{}\n', '{"answer": "left"}\n', '[1]\n', '\n'])
def test_a_spoiled_file_of_answers_is_named(tmp_path, text):
    "One line with file and line; the file stays as it was"
    path = tmp_path/'answers.jsonl'
    study = Study([('a', 1, 2)]*3, path)
    study.answer('left')
    path.write_text(path.read_text() + text)
    before = path.read_text()
    with pytest.raises(ValueError, match='line 2: expected an answer of a study'):
        Study([('a', 1, 2)]*3, path)
    assert path.read_text() == before

def test_sides_say_nothing(tmp_path):
    "Over many pairs each side is on the left about as often, and who always presses ← prefers nobody"
    study = Study([('a', 1, 2)]*400, tmp_path/'answers.jsonl', names=('old', 'new'))
    study.answers = [dict(better=study.names[study.swapped(i)]) for i in range(400)]
    win = tally(study)['win']
    assert win['low'] < .5 < win['high']

def test_foreign_files_stay(tmp_path):
    "Only what the curation wrote is removed"
    (tmp_path/'accepted').mkdir()
    other = tmp_path/'accepted'/'mine.png'
    other.write_bytes(b'not yours')
    mine = Curation(['a "quoted"\nprompt'], torch.zeros(1, 3, 8, 8), tmp_path/'accepted')
    mine.mark(0, True)
    mine.mark(0, False)
    assert [p.name for p in (tmp_path/'accepted').iterdir()] == ['mine.png']

def test_every_branch_is_explored(made):
    "Each way to branch, with the last estimates being what the path ends in"
    model = Denoiser.from_pretrained(made/'xl', guidance=1., device='cpu')
    for branch in BRANCHES.values():
        seen = explore(model, Bright(), PROMPTS[0], branch=branch, n=3, S=4, begin=.5)
        assert seen.rewards.shape[1] == 3 and len(seen.times) == len(seen.rewards)
        assert winners(seen)['where it ends'] == int(seen.rewards[-1].argmax())
