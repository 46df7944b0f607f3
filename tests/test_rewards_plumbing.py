"Combined rewards, a reward over HTTP, and rewards of one's own: equivalences, faults and kills"
import csv, json, math, multiprocessing, os, signal, sys, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest, torch
from PIL import Image

from diffusion_sharpening.worlds.world import weights
from diffusion_sharpening.maths.choice import pair, standardise, tied
from diffusion_sharpening.rewards.mixture import Mixture
from diffusion_sharpening.rewards.protocol import Reward, RewardError
from diffusion_sharpening.evaluation.alarms import alarms, image_stats, picture_stats, shifts
from diffusion_sharpening.rewards.mixture import (
    HOW, Combined, borda, combine, group_scores, neutral, rank, zscore)
from diffusion_sharpening.names.catalog import USES
from diffusion_sharpening.names.grammar import Part
from diffusion_sharpening.rewards.own import Own, load_function
from diffusion_sharpening.names.grammar import parse_spec
from diffusion_sharpening.rewards.remote import (
    Remote, answer, make_server, pack, post, serve, serving, unpack)

CLIP = weights('shapes-clip')

torch.set_num_threads(1)
nan = float('nan')
forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
fork = multiprocessing.get_context('fork') if hasattr(os, 'fork') else None


class Light(Reward):
    "Brightness plus the length of the prompt; NaN for black pictures if it may fail"
    name, differentiable = 'light', True
    def __init__(self, may_fail=False): self.may_fail = may_fail
    def score(self, images, prompts):
        s = images.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])
        return torch.where(images.amax((1, 2, 3)) == 0, nan, s) if self.may_fail else s


class Red(Reward):
    name, differentiable = 'red', True
    def score(self, images, prompts): return 100*images[:, 0].mean((1, 2))


def pics(*shape, seed=0): return torch.rand(*shape, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def one_line(e, part):
    assert part in str(e.value) and '\n' not in str(e.value), str(e.value)


def test_pictures_of_mixed_sizes():
    "Lists of PIL images and tensors of any sizes: in order, each as if it were alone, with its gradient"
    from diffusion_sharpening.rewards.clip import CLIPScore
    g = torch.Generator().manual_seed(0)
    x = [(torch.rand(3, h, w, generator=g)*255).round()/255 for h,
         w in ((64, 64), (30, 200), (64, 64), (200, 30), (30, 200))]
    mixed = [Image.fromarray((o.permute(1, 2, 0)*255).round().byte().numpy()) if i % 2 else o
             for i, o in enumerate(x)]
    r, texts = CLIPScore(CLIP), [f'a {c} star' for c in ('red', 'blue', 'green', 'white', 'black')]
    alone = torch.cat([r(o[None], [t]) for o, t in zip(x, texts)])
    torch.testing.assert_close(r(mixed, texts), alone, atol=1e-5, rtol=0)
    assert r(mixed[::-1], texts[::-1]).tolist() == pytest.approx(alone.tolist()[::-1], abs=1e-5)
    leaf = x[1].clone().requires_grad_(); r([x[0], leaf], texts[:2]).sum().backward()
    assert leaf.grad.abs().sum() > 0
    for bad, part in (([], 'expected at least one picture'), (['a.png'], 'found str'),
                      ([x[0][0]], r'found \(64, 64\)'), ([None], 'found NoneType')):
        with pytest.raises(ValueError, match='^images: .*' + part) as e: r(bad, ['a'])
        assert '\n' not in str(e.value)


# Combining

def gaps(*shape, share=.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    R = torch.randn(*shape, generator=g)
    return R.masked_fill(torch.rand(*shape, generator=g) < share, nan)


def test_zscore_is_standardise_and_ignores_gaps():
    R = torch.randn(3, 6, 5)*40 + 7
    torch.testing.assert_close(zscore(R), standardise(R, dim=1), atol=1e-4, rtol=1e-4)
    G = gaps(7, 9)
    for j in range(9):
        ok = ~G[:, j].isnan()
        torch.testing.assert_close(zscore(G)[ok, j], standardise(G[ok, j]), atol=1e-4, rtol=1e-4)
        assert zscore(G)[~ok, j].isnan().all()


def test_ranks_and_duels_against_counting():
    G = gaps(6, 20).mul(2).round()                       # with ties
    for j in range(20):
        v = G[:, j].tolist()
        known = [x for x in v if x == x]
        for i, x in enumerate(v):
            wins, losses = sum(x > y for y in known), sum(x < y for y in known)
            assert borda(G)[i, j] == wins - losses
            if x != x: assert rank(G)[i, j].isnan()
            elif len(known) > 1:
                share = (wins + (len(known)-1-wins-losses)/2)/(len(known)-1)
                assert rank(G)[i, j].item() == pytest.approx(share)


@pytest.mark.parametrize('how', HOW)
def test_scale_batch_and_order_do_not_matter(how):
    R, w = gaps(3, 2, 8, 6, share=.2), [.5, .2, -.3]
    v = combine(R, w, how)
    same = lambda a, b: torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, equal_nan=True)
    same(combine(R*torch.tensor([1e3, 1., 1e-1]).view(3, 1, 1, 1) + 5, w, how), v)
    same(torch.cat([combine(R[..., i:i+1], w, how) for i in range(6)], -1), v)
    order = torch.randperm(8)
    same(combine(R[:, :, order], w, how), v[:, order])
    same(combine(R.flip(0), w[::-1], how), v)


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('seed', range(5))
def test_a_failed_candidate_is_never_chosen(how, seed):
    "Unless all tie, in which case the prompt is skipped"
    R = gaps(2, 5, 40, share=.4, seed=seed)
    v = combine(R, [1., .7], how)
    full = neutral(v)
    assert full.isfinite().all()
    best, worst = pair(full)
    for j in (~tied(full)).nonzero().flatten(): assert v[best[j], j].isfinite() and v[worst[j], j].isfinite()
    R[0, 2] = nan; R[1, 2] = nan
    if how != 'borda': assert combine(R, [1., .7], how)[2][(~R.isnan()).sum(1).amax(0) > 1].isnan().all()


def test_opposed_rewards_tie_exactly():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, 200, generator=g)
    for how in HOW: assert tied(combine(torch.stack([a, -3*a]), [.3, .3], how)).all()


def test_bad_weights_and_scores():
    R = torch.zeros(2, 3, 1)
    for w in ([1.], [1., nan], [0., 0.], [1., float('inf')]):
        with pytest.raises(ValueError, match='expected 2 finite numbers') as e: combine(R, w)
    with pytest.raises(ValueError, match='infinite'): combine(R + 1/torch.zeros(1), [1., 1.])
    with pytest.raises(ValueError, match='one weight per reward'): Combined([], [])


@pytest.mark.parametrize('how', HOW)
def test_flat_training_batches_are_grouped_per_prompt(how):
    "n candidates of B prompts and k states in one call equal each group alone"
    x, prompts = pics(2, 4, 3), ['a', 'bbb', 'cc']
    r = Combined([Light(), Red()], [1., .5], how)
    R = group_scores(r, x, prompts)
    assert R.shape == (2, 4, 3)
    for k in range(2):
        for j, p in enumerate(prompts):
            S = torch.stack([o(x[k, :, j], [p]*4) for o in r.rewards])[..., None]
            torch.testing.assert_close(R[k, :, j], combine(S, [1., .5], how)[:, 0], atol=1e-3, rtol=1e-3)
    plain = group_scores(Mixture([Light(), Red()], [1., .5]), x, prompts)
    if how == 'zscore': torch.testing.assert_close(plain, R)


def test_failures_in_a_group():
    x = pics(4, 3)
    x[1, 0] = 0; x[:3, 1] = 0; x[:, 2] = 0
    R = group_scores(Light(may_fail=True), x, ['', '', ''])
    assert R.isfinite().all() and tied(R).tolist() == [False, True, True]
    best, worst = pair(R)
    assert 1 not in (best[0], worst[0])
    silent = group_scores(Light(may_fail=True), torch.zeros_like(x), ['', '', ''])
    assert tied(silent).all()
    both = group_scores(Combined([Light(may_fail=True), Red()], [1, 1]), x, ['', '', ''])
    # of black pictures Red still has something to say
    assert both.isfinite().all() and not tied(both)[:2].any()


def test_only_declared_failures_pass():
    class Bad(Reward):
        name = 'bad'
        def score(self, images, prompts): return torch.tensor([nan, 1.])
    with pytest.raises(RewardError, match='bad: 1 of 2'): Bad()(pics(2), ['', ''])
    class Worse(Bad):
        may_fail = True
        def score(self, images, prompts): return torch.tensor([nan, float('inf')])
    with pytest.raises(RewardError, match='bad: 1 of 2'): Worse()(pics(2), ['', ''])
    with pytest.raises(RewardError, match='bad: expected 3 scores'): Worse()(pics(3), ['']*3)
    with pytest.raises(RewardError, match='1 images but 2 prompts'): Bad()([pics(1)[0]], ['', ''])
    x = pics(2, 1); x[0] = nan
    with pytest.raises(RewardError, match='red: 1 of 2'): group_scores(Combined([Red()]), x, [''])


def test_gradients_survive_the_combination():
    x = pics(4, 2).requires_grad_()
    group_scores(Combined([Light(), Red()], [1, 1]), x, ['a', 'b'])[0].sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert (Combined([Light(), Red()]).differentiable
            and not Combined([Light(), Red()], how='rank').differentiable)


# Naming

@pytest.mark.parametrize('name', ['clip', 'image_reward', 'mllm', 'remote', 'own'])
@pytest.mark.parametrize('weight', ['', ':1', ':0.25', ':-3', ':1e-2', ':.5', ':+2.'])
@pytest.mark.parametrize('which', ['', '@shapes', '@zai-org/ImageReward', '@/a b/c.pt', '@http://h:80',
                                   '@https://h:80/v1#m/n:7b',
                                   '@http://[::1]:8000/s', '@pkg.mod:fn', '@C:\\w\\x.pt', '@./x,y'])
def test_names_round_trip(name, which, weight):
    place = which[1:] or None
    text = f'{name}@"{place}"{weight}' if ',' in which else name + which + weight
    for forced in ('', '!'):
        spec = text.replace(name, name + forced, 1)
        got = Part(name, place, float(weight[1:] or 1), bool(forced))
        assert parse_spec(spec) == ('zscore', [got]) == parse_spec(f' {spec} ')
        for how in HOW: assert parse_spec(f'{how}({spec}, clip)') == (how, [got, Part('clip')])


@pytest.mark.parametrize('spec', ['', ' ', ',', 'clip,', ',clip', 'clip,,hps', 'clip=3', 'clip:', 'clip:half',
                                  'clip:1:2', 'clip:nan', 'clip:inf',
                                  'clip:1e999', 'clip@', 'clip@""', '@shapes', ':2', '!', 'clip!!',
                                  'clip hps', 'bordo(clip)', 'rank(clip', 'rank()',
                                  'mine.py', 'mine.py:', 'mine.py:1f', 'a b.c:f!', '3.5'])
def test_bad_names(spec):
    with pytest.raises(ValueError, match='^reward') as e: parse_spec(spec, USES)
    assert '\n' not in str(e.value)


# Functions of one's own

@pytest.fixture
def mine(tmp_path):
    (tmp_path/'beside.py').write_text('K = 2.\n')
    (tmp_path/'mine.py').write_text('''
import numpy as np, torch
from beside import K
def array(images, prompts): return K*images.mean((1, 2, 3)).numpy()
def numbers(images, prompts): return [float(len(p)) for p in prompts]
def tensors(images, prompts): return [x.mean() for x in images]
def breaks(images, prompts):
    return prompts[99]
def text(images, prompts): return 'good'
def column(images, prompts): return images.mean((1, 2, 3))[:, None]
def extra(images, prompts, scale=1.): return images.mean((1, 2, 3))*scale
class Heavy:
    made = 0
    def __init__(self): Heavy.made += 1
    def __call__(self, images, prompts): return images.mean((1, 2, 3))
class Needy:
    def __init__(self, folder): pass
''')
    return tmp_path/'mine.py'


def test_what_functions_may_return(mine):
    x, p = pics(3), ['a', 'bb', 'ccc']
    mean = x.mean((1, 2, 3))
    for f, want in dict(array=2*mean, numbers=torch.tensor([1., 2, 3]), tensors=mean, extra=mean,
                        Heavy=mean).items():
        torch.testing.assert_close(Own(f'{mine}:{f}')(x, p), want)
    heavy = Own(f'{mine}:Heavy')
    heavy(x, p), heavy(x, p)
    assert type(heavy.fn).made == 1
    torch.testing.assert_close(Own(lambda images, prompts: images.mean((1, 2, 3)))(x, p), mean)
    assert Own(f'{mine}:array').name == 'mine:array' and 'beside' in sys.modules
    assert str(mine.parent) not in sys.path
    for f, part in dict(breaks=r"mine:breaks.*IndexError.*\(mine.py, line 8\)",
                        text='expected 3 numbers, found str',
                        column='expected 3 scores').items():
        with pytest.raises(RewardError, match=part) as e: Own(f'{mine}:{f}')(x, p)
        assert '\n' not in str(e.value)
    with pytest.raises(RewardError) as e: Own(f'{mine}:breaks')(x, p)
    assert isinstance(e.value.__cause__, IndexError)                 # the traceback is there for who wants it


@pytest.mark.parametrize('call', ['torch.einsum("ab", images)', 'json.loads(prompts[0])',
                                  'image_stats(images[0])'])
def test_an_error_in_a_library_is_shown_with_the_line_that_called_it(tmp_path, call):
    (tmp_path/'deep.py').write_text('import json, torch\n'
                                    'from diffusion_sharpening.evaluation.alarms import image_stats\n\n'
                                    f'def f(images, prompts):\n    return {call}\n')
    with pytest.raises(RewardError, match=r'\(deep.py, line 5\)'):
        Own(f'{tmp_path}/deep.py:f')(pics(3), ['a']*3)


def test_functions_that_cannot_be_had(mine, tmp_path, monkeypatch):
    (tmp_path/'broken.py').write_text('def f(:\n')
    (tmp_path/'needs.py').write_text('import no_such_package_xyz\n')
    (tmp_path/'falls.py').write_text('\n1/0\n')
    monkeypatch.chdir(tmp_path)
    for which, part in {f'{mine}:arrray': "did you mean 'array'",
                        f'{mine}:K': 'expected a function, found float',
                        f'{mine}:Needy': 'making one raised TypeError',
                        f'{mine}:np.nothing': "no 'nothing'",
                        'mine:np.linalg': 'expected a function, found module',
                        'broken.py:f': 'importing it raised SyntaxError',
                        'needs.py:f': "imports 'no_such_package_xyz'",
                        'needs:f': "imports 'no_such_package_xyz'",
                        'falls.py:f': 'ZeroDivisionError: division by zero (falls.py, line 2)',
                        'no_such_xyz:f': "no module 'no_such_xyz'", 'mine.sub:f': 'no module',
                        'gone.py:f': 'there is no file'}.items():
        with pytest.raises(ValueError, match='^own reward') as e: load_function(which)
        one_line(e, part)
    assert load_function('mine:numbers')(None, ['a']) == [1.]        # a module of the current folder
    for which in (None, 'shapes', ''):
        with pytest.raises(ValueError, match='expected module:function'): Own(which)


# Over HTTP

@contextmanager
def server(reply):
    "Calls `reply(body, k)` for the k-th request: (status, text, headers), or None to hang up"
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_POST(self):
            with lock: k = len(seen); seen.append(dict(self.headers))
            res = reply(json.loads(self.rfile.read(int(self.headers['Content-Length']))), k)
            if res is None: return self.connection.close()
            code, text, head = (*res, {})[:3]
            self.send_response(code)
            for h, v in head.items(): self.send_header(h, v)
            self.end_headers(); self.wfile.write(text.encode())
        do_GET = do_POST
    seen, lock = [], threading.Lock()
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as s:
        s.daemon_threads = s.block_on_close = False
        s.handle_error = lambda *args: None
        threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
        yield f'http://127.0.0.1:{s.server_port}/', seen
        s.shutdown()


def good(body): return 200, json.dumps(dict(scores=[float(p) for p in body['prompts']]))


def test_order_is_kept_and_threads_are_bounded():
    busy = []
    def reply(body, k):
        busy.append(1); most.append(len(busy)); time.sleep(.08 if k % 2 == 0 else .01); busy.pop()
        return good(body)
    most, x = [], pics(21)
    with server(reply) as (url, seen):
        s = Remote(url, threads=3, chunk=2)(x, [str(i) for i in range(21)])
    assert s.tolist() == list(range(21)) and len(seen) == 11 and 2 <= max(most) <= 3


def waiting(monkeypatch, sleep):
    "Let `remote`, and no other thread, sleep in another way"
    clock = SimpleNamespace(**dict(vars(time), sleep=sleep))
    monkeypatch.setattr('diffusion_sharpening.rewards.remote.time', clock)


def test_faults_that_pass(monkeypatch):
    plan = [(500, 'x'), (429, 'x', {'Retry-After': '0'}), None, (503, '')]
    with server(lambda body, k: plan[k] if k < len(plan) else good(body)) as (url, seen):
        waits = []
        waiting(monkeypatch, waits.append)
        assert Remote(url, patience=60)(pics(2), ['3', '4']).tolist() == [3, 4]
    assert len(seen) == 5 and waits[1] == 0 and .4 < waits[0] < .61 and 1.6 < waits[2] < 2.41


@pytest.mark.parametrize('reply, part, asked', [
    ((500, '{"error": "out of\\nmemory"}'), 'after 2 tries; last: HTTP 500: out of memory', 2),
    ((400, '{"error": "images[3]: not a PNG"}'), 'after 1 try; last: HTTP 400: images[3]', 1),
    ((404, '<html>'), 'HTTP 404: Not Found', 1), ((302, '', {'Location': '/other'}), 'HTTP 302', 1),
    ((429, '', {'Retry-After': '999'}), 'HTTP 429', 1), ((200, '<html>'), 'did not reply in JSON', 1),
    ((200, '{"scores": [1]}'), 'expected 2 scores', 1),
    ((200, '{"scores": [1, "2"]}'), 'expected 2 scores', 1),
    ((200, '{"scores": [1, true]}'), 'expected 2 scores', 1),
    ((200, '{"scores": null}'), 'expected 2 scores', 1),
    ((200, '[1, 2]'), 'expected 2 scores', 1), ((200, '{"scores": [1, Infinity]}'), 'no number of JSON', 1),
    (None, 'after 2 tries', 2)])
def test_faults_that_stay(monkeypatch, reply, part, asked):
    waiting(monkeypatch, lambda s: None)
    with server(lambda body, k: reply) as (url, seen):
        with pytest.raises(RewardError, match='^remote: ') as e: Remote(url, patience=.7)(pics(2), ['', ''])
    one_line(e, part)
    assert len(seen) == asked


def test_hanging_and_absent_servers():
    with server(lambda body, k: time.sleep(1.5)) as (url, seen):
        t = time.time()
        with pytest.raises(RewardError, match='timed out'): Remote(url, timeout=.2, patience=0)(pics(1), [''])
        assert time.time() - t < 1.4
    with pytest.raises(RewardError, match='after 1 try'): Remote(url, patience=0)(pics(1), [''])
    with pytest.raises(RewardError, match='after 1 try'):
        Remote('http://no-such-host.invalid/', patience=0)(pics(1), [''])


def test_one_failing_request_stops_the_rest():
    def reply(body, k): time.sleep(.05); return (422, '{"error": "no"}')
    with server(reply) as (url, seen):
        with pytest.raises(RewardError, match='422'): Remote(url, threads=2, chunk=1)(pics(40), ['']*40)
    assert len(seen) < 20


def test_reference_server_equals_the_reward():
    r, x = Light(may_fail=True), pics(9)
    x[4] = 0
    with serving(r) as url:
        far = Remote(url, chunk=4)(x, list('abcdefghi'))
        singles = torch.cat([Remote(url)(x[i:i+1], [c]) for i, c in enumerate('abcdefghi')])
    torch.testing.assert_close(far, r((x*255).round().byte(), list('abcdefghi')), equal_nan=True)
    torch.testing.assert_close(far, singles, atol=1e-5, rtol=0, equal_nan=True)
    assert far.isnan().tolist() == [i == 4 for i in range(9)]


def test_reference_server_refuses():
    with serving(Light(), key='k') as url:
        for key in (None, 'j'):
            with pytest.raises(RewardError, match='HTTP 401: wrong or missing key'): post(url, b'{}', key=key)
        with pytest.raises(RewardError, match='HTTP 400: prompts: expected a list'): post(url, b'{}', key='k')
        with pytest.raises(ValueError, match='cannot serve'):
            make_server(Light(), int(url.split(':')[2].split('/')[0]))
    with pytest.raises(ValueError, match='SHARPEN_REWARD_KEY'): serve(Light(), 0, '0.0.0.0')
    with pytest.raises(ValueError, match='cannot serve'): serve(Light(), 99999)
    code, body = answer(Light(), pack(pics(1), ['a'])[:-9])
    assert code == 400 and 'expected JSON' in body['error']


def test_key_goes_only_where_it_was_sent(monkeypatch):
    monkeypatch.setenv('SHARPEN_REWARD_KEY', 'sesame')
    with server(lambda body, k: good(body)) as (other, stolen):
        with server(lambda body, k: (307, '', {'Location': other})) as (url, seen):
            with pytest.raises(RewardError, match='HTTP 307') as e: Remote(url)(pics(1), ['1'])
    assert seen[0]['Authorization'] == 'Bearer sesame' and not stolen and 'sesame' not in str(e.value)
    with pytest.raises(ValueError, match='no password') as e: Remote('http://u:sesame@h/')
    assert 'sesame' not in str(e.value)


def _serve_here(port):
    # a shell in the background ignores it, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve(Light(), port)


@forks
def test_serve_command_stops_on_interrupt():
    with ThreadingHTTPServer(('127.0.0.1', 0), BaseHTTPRequestHandler) as s: port = s.server_port
    p = fork.Process(target=_serve_here, args=(port,))
    p.start()
    try:
        assert Remote(f'http://127.0.0.1:{port}/score', patience=60)(torch.ones(1, 3, 4, 4), ['']).item() == 1
        os.kill(p.pid, signal.SIGINT)
        p.join(30)
        assert p.exitcode == 0
    finally: p.kill()


def test_serve_reward_command(folder):
    "A server process and its client: the scores of the reward itself, in order, until SIGTERM ends it"
    import subprocess
    from diffusion_sharpening.commands import cli
    env = {k: v for k, v in os.environ.items() if k != 'SHARPEN_REWARD_KEY'} | dict(OMP_NUM_THREADS='1')
    cmd = [sys.executable, '-m', 'diffusion_sharpening', 'serve-reward', '--reward', 'clip@shapes', '--port',
           '0']
    def score(reward, out):
        assert cli.run(['score', '--reward', reward, '--images', str(folder/'pics'), '--prompts',
                        str(folder/'p.txt'), '--out', str(folder/out), '--batch', '5']) == 0
        return [float(r['score']) for r in table(folder/out)]
    p = subprocess.Popen(cmd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = p.stdout.readline()
        assert line.startswith('clip at http://127.0.0.1:') and '--reward remote@http' in line
        url = line.rpartition('remote@')[2].strip()
        far, here = score(f'remote@{url}', 'far'), score('clip@shapes', 'here')
        assert far == pytest.approx(here, abs=1e-5) and max(here) - min(here) > 1e-3
        p.terminate()
        assert p.wait(30) == 0 and p.stderr.read() == ''
    finally: p.kill()
    (folder/'p.txt').write_text('new\n'*12)
    import diffusion_sharpening.rewards.remote as remote
    with pytest.MonkeyPatch.context() as m:
        m.setattr(remote.time, 'sleep', lambda s: None)
        with pytest.raises(ValueError, match='remote: .* gave no scores after 5 tries') as e:
            score(f'remote@{url}', 'far')
    assert '\n' not in str(e.value)


def test_what_serve_reward_refuses(monkeypatch, capsys):
    from diffusion_sharpening.commands import cli
    monkeypatch.delenv('SHARPEN_REWARD_KEY', raising=False)
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for args, part in ((['--reward', 'clpi'], "did you mean 'clip'"),
                           (['--reward', 'clip@shapes', '--host', '0.0.0.0'], 'SHARPEN_REWARD_KEY'),
                           (['--reward', 'clip@shapes', '--port', '99999'], 'cannot serve'),
                           (['--port', 'x'], 'expected a whole number')):
            with pytest.raises(ValueError, match=part): cli.run(['serve-reward', *args])
    finally: [signal.signal(*o) for o in kept.items()]


def test_png_is_lossless():
    x = (pics(1)[0]*255).round()/255
    torch.testing.assert_close(unpack(pack(x[None], ['']))[0][0], x)
    images, prompts = unpack(pack(x[None], ['ü "q"\n']))
    assert prompts == ['ü "q"\n'] and images[0].shape == (3, 8, 8)


# A folder, scored here and over HTTP

@pytest.fixture
def folder(tmp_path):
    "Twelve pictures of two sizes, and their prompts"
    d = tmp_path/'pics'; d.mkdir()
    for i in range(12):
        Image.new('RGB', (8, 8 if i % 3 else 12), (20*i, 0, 0)).save(d/f'im {i}.png')
    (tmp_path/'p.txt').write_text('\ufeff' + '\n'.join('x'*i or 'zero' for i in range(12)) + '\r\n',
                                  encoding='utf-8')
    return tmp_path


def table(path):
    with (path/'scores.csv').open(newline='') as f: return list(csv.DictReader(f))


# Image statistics

def test_statistics_against_plain_loops():
    x = pics(5)
    s = picture_stats(x)
    for i, im in enumerate(x):
        px = im.flatten(1).T.tolist()
        assert s['brightness'][i].item() == pytest.approx(sum(map(sum, px))/3/64, abs=1e-5)
        assert s['saturation'][i].item() == pytest.approx(sum(max(p)-min(p) for p in px)/64, abs=1e-5)
        keys = [tuple(int(v*3.999) for v in p) for p in px]
        n = [keys.count(k)/64 for k in set(keys)]
        assert s['colour_entropy'][i].item() == pytest.approx(-sum(p*math.log2(p) for p in n), abs=1e-4)
        others = [((im-o)**2).mean().sqrt().item() for j, o in enumerate(x) if j != i]
        assert s['diversity'][i].item() == pytest.approx(sum(others)/4, abs=1e-5)
    assert image_stats(x)['diversity'] == pytest.approx(s['diversity'].mean().item())
    assert image_stats(x[:1])['diversity'] == 0


def test_large_pictures_need_little_memory():
    assert image_stats(torch.rand(2, 3, 1024, 1024))['colour_entropy'] > 5.9
    for bad in (torch.zeros(0, 3, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8),
                torch.zeros(1, 3, 1, 8)):
        with pytest.raises(ValueError, match=r'expected \(B, 3, H, W\)'): image_stats(bad)


def test_alarms_ring_for_changes_only():
    g = torch.Generator().manual_seed(0)
    def draw(n):
        return (torch.rand(n, 3, 1, 1, generator=g) + .1*torch.randn(n, 3, 16, 16, generator=g)).clamp(0, 1)
    base = draw(100)
    assert sum(bool(alarms(draw(20), base)) for _ in range(40)) <= 1
    assert alarms(base, base) == [] and all(o['shift'] == 0 for o in shifts(base, base).values())
    dark = alarms(base*.3, base)
    assert (any('darker' in a for a in dark)
            and any('more alike' in a for a in alarms(base[:1].repeat(100, 1, 1, 1), base)))
    for x, said in ((base*.3, 'box area fell: '), (base*.3 + .7, 'box area rose: ')):
        assert alarms(x, base, stats=lambda x: dict(box_area=x.mean((1, 2, 3))))[0].startswith(said)
    assert alarms(base[:3]*0, base) == []                              # too few to be sure of anything
