"The grader through a proxy that misbehaves, and end to end against `transformers serve`"
import base64, io, json, logging, sys, time
from pathlib import Path

import pytest, torch

pytest.importorskip('openai')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'nbs'/'_dev'))
from fault_proxy import FaultProxy
from diffusion_sharpening.rewards import protocol as base
from diffusion_sharpening.rewards.mllm import ASPECTS, MLLMGrader, Settings

torch.set_num_threads(1)
KEY = 'sk-very-secret-1234567890'
PICS = torch.stack([torch.full((3, 16, 16), i/10) for i in range(11)])


def brightness(body):
    "A judge that likes bright pictures: the mean of the picture that was sent, times ten"
    from PIL import Image
    url = body['messages'][0]['content'][0]['image_url']['url']
    im = Image.open(io.BytesIO(base64.b64decode(url.partition(',')[2])))
    return json.dumps(dict.fromkeys(ASPECTS, round(10*im.getpixel((0, 0))[0]/255)))


def grader(proxy, weights=None, request=None, **settings):
    settings = dict(workers=1, timeout=5., retries=2, patience=9) | settings
    return MLLMGrader(f'{proxy.url}#m', Settings(**settings), weights, request)


def grade_one(faults, **settings):
    "Score of a picture of brightness .8, what the grader reports, the proxy and the time"
    with FaultProxy(faults, answer=brightness) as proxy:
        g, start = grader(proxy, **settings), time.time()
        return g.score(PICS[8:9], ['a'])[0].item(), g.report(), proxy, time.time()-start


# Order and threads

def test_order_is_kept_in_threads():
    "Eleven pictures, the first ones slowest: each gets its own grade, and no more than four are in flight"
    def slow(body):
        text = brightness(body); time.sleep(.1 - .01*json.loads(text)['accuracy'])
        return text
    with FaultProxy(answer=slow) as proxy:
        g = grader(proxy, workers=4)
        torch.testing.assert_close(g(PICS, ['a']*11), torch.linspace(0, 1, 11))
        assert proxy.most == 4


def test_batch_equals_singles_and_formats():
    from PIL import Image
    with FaultProxy(answer=brightness) as proxy:
        g = grader(proxy)
        whole = g(PICS, ['a']*11)
        torch.testing.assert_close(whole, torch.cat([g(p[None], ['a']) for p in PICS]))
        bytes8 = (PICS*255).round().byte()
        pil = [Image.fromarray(b.permute(1, 2, 0).numpy()) for b in bytes8]
        assert whole.tolist() == g(bytes8, ['a']*11).tolist() == g(pil, ['a']*11).tolist()


def test_any_aspect_ratio():
    with FaultProxy(answer=brightness) as proxy:
        r = grader(proxy, side=64)(torch.full((1, 3, 30, 900), .5), ['a'])
        url = proxy.seen[0][1]['messages'][0]['content'][0]['image_url']['url']
    from PIL import Image
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(',')[2]))).size == (64, 2) and r.item() == .5


# Faults

@pytest.mark.parametrize('faults, requests, least', [
    (['busy'], 2, 1.), (['broken', 'broken'], 3, .9), (['drop'], 2, .3), (['garbage'], 2, 0),
    (['empty'], 2, 0),
    (['refusal'], 2, 0), (['cut'], 2, 0), (['huge'], 2, 0), (['html'], 2, 0), (['torn'], 2, 0),
    (['schema'], 2, 0), (['garbage', 'broken'], 3, .3)])
def test_faults_that_pass(faults, requests, least):
    "What is asked for again, and then graded"
    r, report, proxy, seconds = grade_one(faults)
    assert r == pytest.approx(.8) and report['failed'] == 0
    assert len(proxy.seen) == requests and seconds >= least


@pytest.mark.parametrize('faults, why', [
    (['broken']*3, 'HTTP 500'), (['busy']*3, 'HTTP 429'), (['garbage']*2, 'no JSON object'),
    (['refusal']*2, 'refused'), (['cut']*2, 'cut off'), (['huge']*2, 'accuracy is not in 0…10'),
    (['empty']*2, 'no choices'), (['policy'], 'HTTP 400'), (['cut', 'refusal'], 'refused')])
def test_faults_that_stay(faults, why):
    "NaN and a count, never a number"
    r, report, proxy, _ = grade_one(faults)
    assert r != r and report['why'] == {why: 1} and report['graded'] == 0
    assert len(proxy.seen) == len(faults)


def test_hang():
    r, report, _, seconds = grade_one(['hang'], timeout=.4)
    assert r == pytest.approx(.8) and .4 < seconds < 4
    r, report, _, seconds = grade_one(['hang', 'hang'], timeout=.4, retries=1)
    assert r != r and report['why'] == {'timeout': 1} and seconds < 5


def test_second_question_has_room_and_a_reason():
    _, _, proxy, _ = grade_one(['cut'], max_tokens=50)
    (_, a), (_, b) = proxy.seen
    assert (a['max_tokens'], b['max_tokens']) == (50, 100)
    assert 'cut off' in b['messages'][0]['content'][1]['text']


def test_one_bad_picture_leaves_the_others():
    with FaultProxy([None, 'refusal', 'refusal'], answer=brightness) as proxy:
        r = grader(proxy).score(PICS[6:9], ['a']*3)
    assert r.isnan().tolist() == [False, True, False] and r[[0, 2]].tolist() == pytest.approx([.6, .8])


def test_nan_passes_the_protocol_where_it_may():
    if not hasattr(base.Reward, 'may_fail'): pytest.skip('Reward has no may_fail')
    with FaultProxy(['policy'], answer=brightness) as proxy:
        assert grader(proxy)(PICS[6:8], ['a']*2).isnan().tolist() == [True, False]


def test_gives_up():
    "After `patience` batches without a grade; at once where there is no server at all"
    with FaultProxy(['policy']*4, answer=brightness) as proxy:
        g = grader(proxy, patience=2)
        assert g.score(PICS[:1], ['a']).isnan().all()
        with pytest.raises(ValueError,
                           match=r"mllm: no grade .* 2 batches in a row; the last: HTTP 400 \(.*policy"):
            g.score(PICS[:1], ['a'])
    with pytest.raises(ValueError, match='no connection'): grader(proxy, retries=0).score(PICS[:1], ['a'])


def test_schema_is_dropped_once():
    with FaultProxy(['schema'], answer=brightness) as proxy:
        g = grader(proxy); g(PICS[:3], ['a']*3)
        assert ['response_format' in b for _, b in proxy.seen] == [True, False, False, False]


def test_request_changes():
    with FaultProxy(answer=brightness) as proxy:
        changes = dict(temperature=None, max_tokens=None, max_completion_tokens=99)
        grader(proxy, request=changes)(PICS[:1], ['a'])
        body = proxy.seen[0][1]
    assert body['max_completion_tokens'] == 99 and not {'temperature', 'max_tokens'} & set(body)


# Keys

@pytest.fixture
def key(monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    monkeypatch.setenv('MLLM_API_KEY', KEY)
    return KEY


def test_key_is_sent_and_never_shown(key, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    with FaultProxy(['key'], answer=brightness) as proxy:
        g = grader(proxy)
        with pytest.raises(ValueError, match=r'refused the key \(401\); set MLLM_API_KEY') as e:
            g.score(PICS[:1], ['a'])
    shown = [str(e.value), repr(e.value), str(e.value.__cause__), repr(g), str(vars(g)),
             json.dumps(g.report())]
    with FaultProxy(['policy'], answer=brightness) as proxy:
        g = grader(proxy, patience=1)
        with pytest.raises(ValueError, match=r'you sent Bearer \(key\)') as e: g.score(PICS[:1], ['a'])
    shown += [str(e.value), caplog.text, *capsys.readouterr()]
    assert not [s for s in shown if KEY in s or KEY[3:15] in s]


def test_foreign_key_stays_here(monkeypatch):
    "OPENAI_API_KEY is not sent to other servers"
    monkeypatch.delenv('MLLM_API_KEY', raising=False)
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    seen = []
    class Proxy(FaultProxy):
        def act(self, fault, body, http):
            seen.append(http.headers['Authorization'])
            return super().act(fault, body, http)
    with Proxy(answer=brightness) as proxy: grader(proxy)(PICS[:1], ['a'])
    assert seen == ['Bearer none']


# Money and memory

def test_budget_is_never_passed():
    "A request may cost 2.3 (2000 and 300 tokens at 1 per thousand), and costs .96; eight threads ask at once"
    with FaultProxy(answer=brightness) as proxy:
        g = grader(proxy, workers=8, budget=7., price_in=1000., price_out=1000.)
        with pytest.raises(ValueError, match=r'the budget of 7 is spent .*; give a larger one'):
            for _ in range(9): g.score(PICS, ['a']*11)
        # requests that were under way come to their end
        for _ in range(100):
            if abs(g.chat.budget.held) < 1e-9: break
            time.sleep(.05)
    assert g.report()['spent'] <= 7 and g.chat.budget.held == pytest.approx(0) and 3 <= len(proxy.seen) <= 7


def test_refused_requests_cost_nothing_and_timeouts_may():
    money = dict(budget=100., price_in=1000., price_out=1000.)
    assert grade_one(['broken']*3, **money)[1]['spent'] == 0
    assert grade_one(['hang']*2, timeout=.3, retries=1, **money)[1]['spent'] == pytest.approx(2.3)
    assert grade_one(['garbage'], **money)[1]['spent'] == pytest.approx(1.92)


def test_cache_keeps_grades_only(tmp_path):
    "A second run asks only for what failed; another prompt, picture, model or temperature is asked anew"
    path = str(tmp_path/'grades.db')
    with FaultProxy(['policy'], answer=brightness) as proxy:
        grader(proxy, cache=path).score(PICS[:3], ['a']*3)
        g = grader(proxy, cache=path, workers=4)
        r = g.score(PICS[:3], ['a']*3)
        assert (len(proxy.seen), g.report()['cached']) == (4, 2) and r.tolist() == pytest.approx([0, .1, .2])
        g.score(PICS[:3], ['b']*3); assert len(proxy.seen) == 7
        grader(proxy, cache=path, temperature=1.).score(PICS[:3], ['a']*3); assert len(proxy.seen) == 10
        h = grader(proxy, dict(accuracy=1.), cache=path)              # other weights need no new grades
        h.score(PICS[:3], ['b']*3); assert len(proxy.seen) == 10


# End to end

@pytest.fixture(scope='module')
def served():
    "The embedded grader behind `transformers serve`"
    for m in ('fastapi', 'uvicorn'): pytest.importorskip(m)
    from diffusion_sharpening.rewards.local_grader import serve
    from diffusion_sharpening.worlds.world import weights
    with serve(weights('shapes-grader')) as which: yield which


@pytest.mark.slow
def test_end_to_end(served):
    "The small model prefers the caption a picture was drawn for"
    from diffusion_sharpening.worlds.shapes.draw import picture, prompts
    texts = prompts(48, seed=77); other = texts[6:] + texts[:6]
    ims = torch.stack([picture(t, i) for i, t in enumerate(texts)])
    g = MLLMGrader(served, Settings(timeout=60.), weights=dict(accuracy=1.))
    right, wrong = g(ims, texts), g(ims, other)
    assert g.report()['failed'] == 0
    assert right.mean() > wrong.mean() + .15 and (right >= wrong).float().mean() > .85


@pytest.mark.slow
def test_end_to_end_through_faults(served):
    from diffusion_sharpening.worlds.shapes.draw import picture, prompts
    (url, _, model), texts = served.partition('#'), prompts(12, seed=3)
    faults = ['busy', 'broken', 'garbage', 'refusal', 'cut', 'hang', 'drop', 'torn', 'huge']
    ims = torch.stack([picture(t, i) for i, t in enumerate(texts)])
    with FaultProxy(faults, url) as proxy:
        g = MLLMGrader(f'{proxy.url}#{model}', Settings(timeout=15., retries=4))
        r = g.score(ims, texts)
        assert proxy.faults == [] and r.isfinite().sum() >= 8
        # whose second reply was spoilt too is not asked a third time
        assert len(proxy.seen) >= 12 + 9 - r.isnan().sum()
        assert g.report()['failed'] == r.isnan().sum()
    assert MLLMGrader(served).score(ims, texts).isfinite().all()


@pytest.mark.slow
def test_embedded_by_name():
    "`shapes` starts the server by itself"
    from diffusion_sharpening.names.catalog import load_reward
    from diffusion_sharpening.worlds.shapes.draw import picture, prompts
    text, g = prompts(1)[0], load_reward('mllm@shapes')
    assert g(picture(text)[None], [text]).isfinite().all()


@pytest.mark.slow
def test_training_on_two_rewards(served, tmp_path):
    "`sharpen train rlhf` with a grader behind a faulty proxy; the report counts pictures, failures and money"
    from diffusion_sharpening.commands import cli
    from rewards_train_mllm import command, record
    url, _, model = served.partition('#')
    with FaultProxy(['busy', 'garbage', 'policy', 'refusal', 'refusal'], url) as proxy:
        assert cli.run([*command(f'{proxy.url}#{model}', tmp_path/'run', 2, n=2, batch=2), 'seed=3']) == 0
        assert proxy.faults == [] and {m['model'] for _, m in proxy.seen} == {model}
    got = record(tmp_path/'run', 2)
    judge = got['grader']
    assert (judge['graded'] + judge['failed'] == 2*24 + 2*got['pictures_per_batch']
            and 1 <= judge['failed'] < 20)
    assert judge['why'].get('HTTP 400') == 1 and 0 < judge['spent'] < 1 and got['batches'] == 2
    assert got['checker_change']['low'] <= got['checker_change']['high']
