"Methods, models and networks that are used a second time"
import os, signal
import pytest, torch
from diffusion_sharpening.commands.load import load_model, quiet
from diffusion_sharpening.data.sources import Prompts
from diffusion_sharpening.methods.catalog import find
from diffusion_sharpening.methods.contrast import Contrast
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.tiny import tiny_sdxl
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.training.checkpoints import checkpoints
from diffusion_sharpening.training.loop import train
from diffusion_sharpening.training.resume import Checkpoint
from diffusion_sharpening.training.run import Run
from diffusion_sharpening.worlds.world import WORLDS

RUN = Run(steps=4, batch=2, rank=2, lr=1e-2, ema=0., warmup=1)
quiet()


def trained(method, model=None, judge=None, callbacks=()):
    model = model or load_model('layouts')
    source = Prompts(model, WORLDS['layouts'].prompts(6, 'train', 1), RUN.batch)
    return train(model, method, judge or load_reward('tidy', 'layouts'), source, RUN, callbacks).model


def weights(model): return torch.cat([p.detach().flatten() for p in model.named['policy'].values()])


@pytest.mark.parametrize('name, own', [
    ('nft', dict(rise=.05)), ('ddpo', dict(memory=8, least=2)), ('crd', {}), ('graft', dict(round=4))])
def test_a_method_begins_anew(name, own):
    "What a training left in a method does not reach the next one"
    method = find(name)(n=3, S=3, **own)
    first = weights(trained(method))
    assert first.abs().sum() > 0
    assert torch.equal(weights(trained(method)), first)


def test_a_model_is_trained_again():
    "After `reset` a model learns what it learned before"
    method, model = find('contrast')(n=3, S=3), load_model('layouts')
    first = weights(trained(method, model))
    with pytest.raises(ValueError, match='model.reset()'): trained(method, model)
    assert torch.equal(weights(trained(method, model.reset())), first)


def test_a_carried_lora_is_not_trained(tmp_path):
    "Not by a view that was made while another was alive, either"
    tiny_sdxl(tmp_path/'xl', words=['red circle'])
    one = Denoiser.from_pretrained(tmp_path/'xl', guidance=1.).add_lora(2)
    for p in one.trainable(): torch.nn.init.normal_(p, std=.1)
    one.save_lora(tmp_path/'lora')
    first = Denoiser.from_pretrained(tmp_path/'xl', guidance=1.)
    first.pipe.load_lora_weights(tmp_path/'lora')
    two = Denoiser(first.pipe, guidance=1.)
    assert two.trainable() == []
    two.add_lora(2)
    assert len(two.trainable()) == len(two.named['policy'])
    assert two.policies.carried


def test_a_reset_pipeline_is_saved_as_it_was_loaded(tmp_path):
    "And so is one that learns as a whole after it"
    tiny_sdxl(tmp_path/'xl', words=['red circle'])
    model, texts = Denoiser.from_pretrained(tmp_path/'xl', guidance=1.), ['red circle']
    base = model.sample(texts, S=2)
    model.add_lora(2)
    model.reset().save_pipeline(tmp_path/'same')
    assert torch.equal(Denoiser.from_pretrained(tmp_path/'same', guidance=1.).sample(texts, S=2), base)
    two = Denoiser(model.pipe, guidance=1.).add_full(keep_base=True)
    with torch.no_grad():
        for p in two.trainable(): p.mul_(1.01)
    made = two.sample(texts, S=2)
    two.save_pipeline(tmp_path/'full')
    assert torch.equal(Denoiser.from_pretrained(tmp_path/'full', guidance=1.).sample(texts, S=2), made)
    assert torch.equal(two.reset().sample(texts, S=2), base)


def test_two_views_of_one_pipeline(tmp_path):
    "The reference of each is the base, whichever of them was trained"
    tiny_sdxl(tmp_path, words=['red circle'])
    one = Denoiser.from_pretrained(tmp_path, guidance=1.)
    two, texts = Denoiser(one.pipe, guidance=1.), ['red circle']
    base = two.sample(texts, S=2)
    one.add_lora(2)
    for p in one.trainable(): torch.nn.init.normal_(p)
    assert not torch.equal(two.sample(texts, S=2), base)
    with two.reference(): assert torch.equal(two.sample(texts, S=2), base)
    Denoiser(one.pipe)
    assert len(one.trainable()) > 0                                  # another view freezes nothing


@pytest.fixture
def interruptible():
    "Ctrl-C as it is in a terminal; a shell has it ignored for what it starts in the background"
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def test_a_second_interrupt_saves(tmp_path, capfd, interruptible):
    "What was learned before the batch that two Ctrl-C break is kept"
    tidy, calls = load_reward('tidy', 'layouts'), []
    def press(pages, prompts):
        calls.append(1)
        if len(calls) == 3: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
        return tidy(pages, prompts)
    with pytest.raises(KeyboardInterrupt):
        trained(find('contrast')(n=3, S=3), None, press, [Checkpoint(tmp_path, {})])
    assert [c.name for c in checkpoints(tmp_path)] == ['step-00000002']
    out, err = capfd.readouterr()
    assert 'SIGINT: the batch is finished first; again: at once' in err and 'saved after batch 2' in out


def test_a_stop_that_nobody_reads_finishes_the_batch(monkeypatch, interruptible):
    "`sharpen train … | tee log`: Ctrl-C ends tee too"
    tidy, calls, write = load_reward('tidy', 'layouts'), [], os.write
    def gone(fd, text):
        if fd == 2: raise BrokenPipeError
        return write(fd, text)
    def press(pages, prompts):
        calls.append(1)
        if len(calls) == 2: os.kill(os.getpid(), signal.SIGINT)
        return tidy(pages, prompts)
    monkeypatch.setattr(os, 'write', gone)
    model = load_model('layouts')
    source = Prompts(model, WORLDS['layouts'].prompts(6, 'train', 1), RUN.batch)
    s = train(model, find('contrast')(n=3, S=3), press, source, RUN)
    assert (s.stop, s.k, s.whole) == ('SIGINT', 2, True)


class Remembers(Contrast):
    "Its state begins in `start`"
    def start(self, model):
        super().start(model)
        self.seen = 0

    def state(self): return dict(seen=self.seen)

    def restore(self, state): self.seen = int(state['seen'])


def test_state_may_begin_in_start(tmp_path):
    assert trained(Remembers(n=3, S=3), callbacks=[Checkpoint(tmp_path, {})]).named
    assert checkpoints(tmp_path)
