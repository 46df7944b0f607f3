"A model of one's own: what passes `check_model` and is a `Learner` is trained, whatever its network"
import pytest, torch
from torch import nn
from diffusion_sharpening.data.sources import Prompts
from diffusion_sharpening.maths.samplers import flow_grid
from diffusion_sharpening.maths.schedules import Flow
from diffusion_sharpening.methods.catalog import METHODS, find
from diffusion_sharpening.models.cond import Cond
from diffusion_sharpening.models.learner import Learner
from diffusion_sharpening.models.pixels import PixelFlow
from diffusion_sharpening.models.policies import Policies
from diffusion_sharpening.models.protocol import check_model
from diffusion_sharpening.rewards.own import Own
from diffusion_sharpening.training.loop import train
from diffusion_sharpening.training.run import Run

torch.set_num_threads(1)


class Net(nn.Module):
    "Plain layers under plain names"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x, t, told): return self.b(torch.tanh(self.a(torch.cat([x, t, told], -1))))


class Points(Learner):
    "Points of the plane; a prompt is its length"
    item, kind, cost, eta, schedule = (2,), 'flow', 1, 1., Flow()

    def __init__(self):
        torch.manual_seed(0)
        self.policies, self.device = Policies(Net()), torch.device('cpu')

    def encode(self, prompts): return Cond(told=torch.tensor([[float(len(p))] for p in prompts]))
    def unconditional(self, n=1): return Cond(told=torch.zeros(n, 1))
    def grid(self, S): return flow_grid(S)
    def latents(self, things): return things.float()
    def show(self, x0, chunk=8, fast=False, grad=False): return x0

    def output(self, x_t, t, cond):
        lead = x_t.shape[:-1]
        t = torch.as_tensor(t, dtype=torch.float32).expand(lead)[..., None]
        return self.policies(x_t.float(), t, cond['told'].expand(*lead, 1))


def right(points, prompts): return points[:, 0]
right.differentiable = True

ALONE = [k for k in METHODS if not find(k)().columns and find(k)().needs_judge]


def test_it_is_a_model(): check_model(Points().add_full(keep_base=True), ['a', 'bc'], torch.rand(2, 2), 1e-5)


@pytest.mark.parametrize('name', ALONE)
def test_every_method_that_learns_from_prompts_trains_it(name):
    model, method = Points(), find(name)()
    before = {k: p.clone() for k, p in model.network.named_parameters()}
    s = train(model, method, Own(right), Prompts(model, ['a', 'bc', 'def', 'ghij'], size=4),
              Run(steps=2, rank=0, batch=4, lr=1e-2))
    assert s.k == 2 and not s.skipped
    assert any(not torch.equal(p, before[k]) for k, p in model.network.named_parameters())


def test_a_pixel_flow_trains():
    model = PixelFlow((1, 8, 8), widths=(16, 16))
    bright = Own(lambda images, prompts: images.mean((1, 2, 3)))
    s = train(model, find('rlhf')(n=2, S=3), bright, Prompts(model, ['a', 'b'], size=2),
              Run(steps=2, rank=0, batch=2))
    assert s.k == 2 and not s.skipped


def test_lora_needs_a_network_that_takes_it():
    with pytest.raises(ValueError, match='expected a network with.*found Net; rank=0 trains every weight'):
        Points().add_lora()


def test_show_takes_what_it_is_asked_with():
    class Bare(Points):
        def show(self, x0): return x0
    with pytest.raises(AssertionError, match='show: expected'): check_model(Bare(), ['a', 'bc'])
