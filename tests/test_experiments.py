"An experiment keeps what is whole, and no half training becomes a result"
import os, signal
import pytest
import torch
from diffusion_sharpening.experiments.arms import Arm
from diffusion_sharpening.experiments.bed import bed_of
from diffusion_sharpening.experiments.command import experiment, said
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
