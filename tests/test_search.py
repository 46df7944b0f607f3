"Every search on a diffusers network with guidance: the base at budget 1×, the count of its page, its steers"
import json
import pytest, torch

pytest.importorskip('diffusers')
from diffusion_sharpening.basics.seeds import START, fold, noise
from diffusion_sharpening.maths.rollout import Meter, Predictor, check_steer, rollout
from diffusion_sharpening.maths.samplers import flow_grid, flow_sde_coefs
from diffusion_sharpening.maths.schedules import Flow, pad_right
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.tiny import tiny_sd3, tiny_sdxl
from diffusion_sharpening.rewards.mixture import Combined, borda, rank, zscore
from diffusion_sharpening.rewards.protocol import Reward
from diffusion_sharpening.search.catalog import SEARCHES
from diffusion_sharpening.search.demon import ends, mixed_noise, softmax_weights, tanh_weights
from diffusion_sharpening.search.fk import Particles
from diffusion_sharpening.search.free2guide import best_branch
from diffusion_sharpening.search.protocol import Verifier, candidate_seeds, lineage, record
from diffusion_sharpening.search.verifiers import minmax, raw

PROMPTS, S, G = ['a red circle', 'a blue square'], 4, 2
SMALL = dict(zero_order=dict(n=2), paths=dict(first=2, up=1, down=2), fk=dict(every=1))


class Bright(Reward):
    name = 'bright'
    def score(self, images, prompts): return 100*images.mean((1, 2, 3))


class Red(Reward):
    name = 'red'
    def score(self, images, prompts): return images[:, 0].mean((1, 2))


@pytest.fixture(scope='module')
def net(tmp_path_factory):
    d = tmp_path_factory.mktemp('search')
    tiny_sdxl(d/'xl', words=PROMPTS)
    return Denoiser.from_pretrained(d/'xl', guidance=2., device='cpu', size=32, eta=1.)


SEEDS = fold(0, torch.arange(2))


def run(net, name, budget, judge=Bright(), prompts=PROMPTS, seeds=SEEDS, **own):
    return SEARCHES[name](net, judge, prompts, seeds, S, budget, **SMALL.get(name, {}) | own)


def base(net, seeds=SEEDS, prompts=PROMPTS):
    z = noise(seeds, START, net.item)
    return rollout(net, z, net.grid(S), net.encode(prompts), 1., seeds).end


@pytest.mark.parametrize('name', SEARCHES)
def test_budget_of_one_sample_is_the_base(net, name):
    res = run(net, name, S*G)
    assert torch.equal(res.x0, base(net)) and res.nfe == S*G and res.calls == 1
    assert torch.equal(res.seed, SEEDS)
    with pytest.raises(ValueError, match='budget: expected at least 8 evaluations'): run(net, name, S*G - 1)


# Evaluations and reward calls of a picture, as the catalogue has them: of n or K, R rounds, s steps
COUNTS = dict(
    best_of_n=lambda k: (k*S*G, k), fk=lambda k: (k*S*G, k*(S - 1) + k),
    zero_order=lambda R: (R*3*S*G, R*3), free2guide=lambda n: ((1 + (S - 1)*n)*G, (S - 1)*n + 1),
    demon=lambda K: ((S + (S - 1)*K)*G, (S - 1)*K + 1), paths=lambda N: (N*(S + 3)*G, N*3))


@pytest.mark.parametrize('name', SEARCHES)
def test_counts(net, name):
    "The meter gives the formula, and so does the network itself"
    for k in (2, 3):
        nfe, calls = COUNTS[name](k)
        asked = []
        hook = net.network.register_forward_pre_hook(lambda m, args: asked.append(len(args[0])))
        try: res = run(net, name, nfe)
        finally: hook.remove()
        assert (res.nfe, res.calls) == (nfe, calls)
        assert sum(asked) == nfe*len(PROMPTS)
        more = run(net, name, nfe + G - .5)                    # what does not pay for anything is not spent
        assert more.nfe == nfe and torch.equal(more.x0, res.x0)


@pytest.mark.parametrize('name', SEARCHES)
def test_never_over_budget(net, name):
    for budget in (13, 41.5): assert run(net, name, budget).nfe <= budget


@pytest.mark.parametrize('name', SEARCHES)
def test_alone_as_in_a_batch_and_twice(net, name):
    both, again = run(net, name, 56), run(net, name, 56)
    assert torch.equal(both.x0, again.x0) and record(both, 1) == record(again, 1)
    alone = run(net, name, 56, prompts=PROMPTS[1:], seeds=SEEDS[1:])
    assert torch.allclose(alone.x0[0], both.x0[1], atol=.02) and alone.seed[0] == both.seed[1]


@pytest.mark.parametrize('name', SEARCHES)
def test_record(net, name):
    res = run(net, name, 56)
    shown = Bright()(net.show(res.x0), PROMPTS)
    assert torch.allclose(res.value, shown, atol=1e-3)
    for b in (0, 1):
        told, line = record(res, b), lineage(res, b)
        assert json.loads(json.dumps(told)) == told
        assert line[-1]['round'] == len(res.rounds) - 1 and line[0]['round'] == 0
        for a, c in zip(line, line[1:]):
            assert told['rounds'][c['round']]['parents'][c['candidate']] == a['candidate']


@pytest.mark.parametrize('name', SEARCHES)
def test_several_judges(net, name):
    for how in (rank, minmax):
        res = run(net, name, 32, Combined([Bright(), Red()], [.7, .3], how))
        assert res.x0.isfinite().all() and res.rounds[0].scores.shape[0] == 2


@pytest.mark.parametrize('how', [zscore, rank, borda, minmax, raw])
def test_judges_that_agree_choose_as_one(net, how):
    "Two of the same judge, however they are combined"
    both = Combined([Bright(), Bright()], [.7, .3], how)
    one, two = (run(net, 'zero_order', 48, judge) for judge in (Bright(), both))
    assert torch.equal(one.x0, two.x0)


def estimate(net, cond, J): return lambda x, i: ends(net, x, net.grid(S)[i+1:], cond, J)


STEERS = dict(
    free2guide=lambda look, net, c: best_branch(look, 3, range(3), []),
    later=lambda look, net, c: best_branch(look, 3, range(1, 3), []),
    demon=lambda look, net, c: mixed_noise(look, estimate(net, c, 1), 3, range(3), tanh_weights, []),
    demon_ode=lambda look, net, c: mixed_noise(look, estimate(net, c, 2), 3, range(3), softmax_weights, []))


@pytest.mark.parametrize('name', STEERS)
def test_steers(net, name):
    cond = net.encode(PROMPTS)
    made = lambda rows: STEERS[name](Verifier(net, Bright(), PROMPTS[rows]), net, cond[rows])
    check_steer(made, net, noise(SEEDS, START, net.item), net.grid(S), cond, 1., SEEDS)


def test_particles_are_a_steer(net):
    own, cond = candidate_seeds(SEEDS, 4), net.encode(PROMPTS)
    made = lambda rows: Particles(Verifier(net, Bright(), PROMPTS[rows]), range(1, S))
    check_steer(made, net, noise(own, START, net.item), net.grid(S), cond, 1., own)


def test_estimates_of_a_few_step_model_are_counted(net):
    quick = Meter(net.with_guidance(1.))
    res = run(net, 'demon', (S + 3*2)*G, quick=quick)          # four noises at half the price
    assert quick.nfe == 3*4*len(PROMPTS) and res.nfe == S*G + 3*4


def test_without_fresh_noise(net):
    "A model that is sampled without noise is the base of best of n; searches that branch give it noise"
    still = Denoiser(net.pipe, 2., size=32, eta=0.)
    z = noise(SEEDS, START, net.item)
    plain = rollout(still, z, net.grid(S), net.encode(PROMPTS)).end
    for name in ('best_of_n', 'zero_order', 'paths'): assert torch.equal(run(still, name, S*G).x0, plain)
    for name in ('free2guide', 'demon', 'fk'): assert torch.equal(run(still, name, S*G).x0, base(net))


@pytest.fixture(scope='module')
def flow(tmp_path_factory):
    d = tmp_path_factory.mktemp('flow')
    tiny_sd3(d/'sd3', words=PROMPTS, layers=1, t5=False)
    return Denoiser.from_pretrained(d/'sd3', guidance=2., device='cpu', size=32, eta=1.)


@pytest.mark.parametrize('name', SEARCHES)
def test_rectified_flow(flow, name):
    "Searches on SD 3: the base at budget 1×, and the same counts"
    assert torch.equal(run(flow, name, S*G).x0, base(flow))
    nfe, calls = COUNTS[name](2)
    res = run(flow, name, nfe)
    assert (res.nfe, res.calls) == (nfe, calls) and res.x0.isfinite().all()


def test_stochastic_flow_step_keeps_the_law():
    "Normal data under the exact velocity: 400 stochastic steps keep it, and without noise a step is Euler's"
    sch, mean, var = Flow(), 1., .25
    def predict(x, t, cond=None):
        a, s = (pad_right(o, x) for o in sch.alpha_sigma(t))
        x0 = mean + a*var/(a*a*var + s*s)*(x - a*mean)
        return x0, (x - a*x0)/s
    model, seeds = Predictor(predict, sch, (1,)), fold(0, torch.arange(20_000))
    z, ts = noise(seeds, START, (1,)), flow_grid(400)
    end = rollout(model, z, ts, eta=.7, seeds=seeds, keep=False, coefs=flow_sde_coefs).end
    assert abs(end.mean() - 1) < .02 and abs(end.std() - .5) < .02
    x, ts = z[:100], flow_grid(10)
    for t, s in zip(ts, ts[1:]):
        x0, eps = predict(x, t.expand(100))
        x = x + (s - t)*(eps - x0)
    quiet = rollout(model, z[:100], flow_grid(10), eta=0., coefs=flow_sde_coefs).end
    assert torch.allclose(quiet, x, atol=1e-4)
