"An experiment keeps what is whole, and no half training becomes a result"
import os, signal
import pytest
import torch
from diffusion_sharpening.experiments.arms import Arm
from diffusion_sharpening.experiments.bed import bed_of
from diffusion_sharpening.experiments.command import experiment, said
from diffusion_sharpening.experiments.material import Material
from diffusion_sharpening.models.tiny import tiny_sdxl
from diffusion_sharpening.experiments.compare import compared
from diffusion_sharpening.worlds.layouts.judges import Tidy


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=['heard', 'ignored'])
def interrupts(request):
    "What SIGINT does; a shell has it ignored for what it starts in the background"
    old = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures('interrupts')
def test_a_training_that_is_stopped_is_not_recorded(tmp_path, monkeypatch):
    "The signal ends the experiment; the base, which was whole, is kept"
    score, asked = Tidy.score, []
    def stopping(self, things, prompts):
        asked.append(len(prompts))
        if len(asked) == 20: os.kill(os.getpid(), signal.SIGINT)
        return score(self, things, prompts)
    monkeypatch.setattr(Tidy, 'score', stopping)
    arms = {'NFT': Arm('nft', own=dict(n=2, S=2), batch=2)}
    with pytest.raises(KeyboardInterrupt):
        compared(arms, bed_of('layouts', budget=1e9, heldout=4, S=2), [0], tmp_path, tune=False)
    assert len(asked) >= 20 and [p.name for p in (tmp_path/'runs').iterdir()] == ['base-0.json']


def test_a_judge_may_say_nothing(tmp_path, monkeypatch, capsys):
    "Prompts without a score are left out of means, in tries, runs and the table"
    score = Tidy.score
    def mute(self, things, prompts):
        at = torch.tensor([len(p) % 3 == 0 for p in prompts])
        return score(self, things, prompts).masked_fill(at, torch.nan)
    monkeypatch.setattr(Tidy, 'score', mute); monkeypatch.setattr(Tidy, 'may_fail', True)
    small = dict(budget=400., seeds=2, heldout=6, only='NFT')
    found = experiment('comparison', 'layouts', **small, out=str(tmp_path))
    own = found['arms']['NFT']['value'][found['followed']]
    assert own['missing'] > 0 and own['mean'] is not None
    assert said(found) and 'try' in capsys.readouterr().out


TEXTS = [f'a {c} {s}' for c in ('red', 'blue', 'green', 'grey') for s in ('dog', 'star', 'tree')]
OWN = dict(model='xl', prompts='prompts.txt', reward='mine.py:red', also='mine.py:even', S=2, seeds=1)

@pytest.fixture
def brought(tmp_path, monkeypatch):
    "A folder with a model of no world, prompts and judges; it is the working folder"
    monkeypatch.chdir(tmp_path)
    tiny_sdxl('xl', words=' '.join(TEXTS).split(), sample_size=8)
    (tmp_path/'prompts.txt').write_text('\n'.join(TEXTS))
    (tmp_path/'mine.py').write_text('def red(images, prompts): return images[:, 0].mean((1, 2))\n'
                                    'def even(images, prompts): return 1 - images.std((1, 2, 3))\n')
    return tmp_path

def test_tries_and_runs_see_no_held_out_prompt(brought, monkeypatch):
    "A few prompts are measured in a try; those that are trained on never are among the held-out ones"
    from diffusion_sharpening.experiments import bed as at
    (brought/'held.txt').write_text('\n'.join([*TEXTS[:5], 'two trees']))
    trained, train = [], at.train
    def seen(model, method, judge, source, run, watch):
        trained.append(({*source.prompts}, run.seed))
        return train(model, method, judge, source, run, watch)
    monkeypatch.setattr(at, 'train', seen); monkeypatch.setattr(at, 'FEW', 2)
    monkeypatch.setattr('diffusion_sharpening.experiments.compare.FEW', 2)
    rep = experiment('comparison', **OWN, heldout_prompts='held.txt', budget=100., only='NFT', guidance=1.)
    assert len(trained) == 7 and all(o == {*TEXTS[5:]} for o, _ in trained)
    assert rep['arms']['NFT']['value']['mine:red']['over'] == '6 prompts of 1 seed'

def test_judges_are_loaded_once(brought, monkeypatch):
    "A large judge is in memory once, however many runs and tries there are"
    from diffusion_sharpening.experiments import bed as at
    loaded, load = [], at.load_reward
    def counting(name, *more, **how):
        loaded.append(name)
        return load(name, *more, **how)
    monkeypatch.setattr(at, 'load_reward', counting)
    monkeypatch.setattr('diffusion_sharpening.commands.job.load_reward', counting)
    experiment('comparison', **OWN, budget=100., only='NFT')
    assert loaded == ['mine.py:red', 'mine.py:even']

def test_guidance_counts_twice(brought):
    "Pictures made with guidance cost two evaluations a step, for searches and trainings alike"
    def bed(guidance): return bed_of('xl', 'mine.py:red', budget=1., heldout=2, S=2, also=('mine.py:even',),
                                     guidance=guidance, material=Material('prompts.txt'))
    assert [bed(g).per_picture for g in (1., 3., None)] == [2, 4, 4]
    rep = experiment('table1', **OWN, budget=100., only='best_of_n, 8×', guidance=3.)
    assert {k: o['nfe'] for k, o in rep['arms'].items()} == {'base': [4], 'best_of_n, 8×': [32]}

def test_what_is_asked_for_in_vain_is_said(brought):
    for more, why in ((dict(only='standard'), 'standard: it learns from pictures: --images'),
                      (dict(only='Diffusion-DPO'), 'it learns from preferences: --choices'),
                      (dict(settings='lr=.1'), 'setting of every training'),
                      (dict(also=None), 'a judge that is not followed as the yardstick'),
                      (dict(prompts=None), 'px: expected --prompts'),
                      (dict(model='shapes'), 'models of shapes are compared on its own')):
        with pytest.raises(ValueError, match=why): experiment('comparison', **OWN | dict(px=64) | more)
