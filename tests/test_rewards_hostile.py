"Servers, clients, replies and files that mean harm, or are merely wrong: bounded, and one line"
import base64, json, os, re, resource, signal, socket, subprocess, sys, threading, time, zlib
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest, torch

from diffusion_sharpening.names.catalog import usable
from diffusion_sharpening.names.grammar import public_spec
from diffusion_sharpening.rewards.files import read_state
from diffusion_sharpening.rewards.mllm import ASPECTS, BadReply, MLLMGrader, Settings, read_grade
from diffusion_sharpening.rewards.own import Own
from diffusion_sharpening.rewards.protocol import Reward, RewardError
from diffusion_sharpening.rewards.remote import MAX_BODY, MAX_REPLY, Remote, serving

torch.set_num_threads(1)
GOOD = dict.fromkeys(ASPECTS, 7)


class Light(Reward):
    name = 'light'
    def score(self, images, prompts): return images.mean((1, 2, 3))


def one_line(e, *parts):
    text = str(e.value)
    assert '\n' not in text and len(text) < 700, text
    for p in parts: assert p in text, text


def bomb(side):
    "A black PNG of `side` × `side` pixels, one bit each"
    def chunk(kind, data):
        return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    head, z = side.to_bytes(4, 'big')*2 + bytes([1, 0, 0, 0, 0]), zlib.compressobj(9)
    rows = b''.join(z.compress(bytes(1 + (side+7)//8)) for _ in range(side)) + z.flush()
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


def asked(url, body, **head):
    "Status and JSON of a raw request"
    at = urlsplit(url); c = HTTPConnection(at.hostname, at.port, timeout=20)
    c.putrequest('POST', at.path)
    head = {'Content-Length': str(len(body))} | {k.replace('_', '-'): v for k, v in head.items()}
    for k, v in head.items(): c.putheader(k, v.encode('latin-1', 'replace'))
    c.endheaders(body)
    r = c.getresponse()
    return r.status, json.loads(r.read())


@contextmanager
def talking(talk):
    "A server that calls `talk(handler)` for every request"
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_POST(self):
            self.rfile.read(int(self.headers['Content-Length']))
            try: talk(self)
            except OSError: pass
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as s:
        s.daemon_threads, s.block_on_close = True, False
        threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
        yield f'http://127.0.0.1:{s.server_port}/'
        s.shutdown()


def says(code, body, **head):
    def talk(h):
        h.send_response(code)
        for k, v in head.items(): h.send_header(k.replace('_', '-'), v)
        h.end_headers(); h.wfile.write(body)
    return talk


def drips(h):
    h.send_response(200); h.end_headers()
    for _ in range(3000): h.wfile.write(b' '); h.wfile.flush(); time.sleep(.02)


def drips_headers(h):
    for _ in range(3000): h.wfile.write(b'H'); h.wfile.flush(); time.sleep(.02)


# A server that is asked

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_bombs_are_refused_by_their_headers():
    "Three small files that would take gigabytes: refused, and the memory of the process stays where it was"
    big = [base64.b64encode(bomb(n)).decode() for n in (13000, 4000)]
    with serving(Light()) as url:
        before = peak()
        for files, why in ((big[:1]*3, 'images[0]: expected a PNG file'), (big[1:]*5, 'pixels in all')):
            code, reply = asked(url, json.dumps(dict(prompts=['']*len(files), images=files)).encode())
            assert code == 400 and why in reply['error'] and '\n' not in reply['error']
        assert peak() - before < 200_000                                     # kB
        assert asked(url, json.dumps(dict(prompts=[], images=[])).encode())[0] in (400, 422)   # still there


@pytest.mark.parametrize('body, why', [
    (b'['*10**6, 'nested too deep'), (b'{"prompts":' + b'1'*5000 + b'}', 'digits'), (b'{"a": NaN}', 'NaN'),
    (b'\xff\xfe', 'expected JSON'), (b'"\xff"', 'UTF-8'), (b'', 'no JSON'),
    (b'{"prompts": {}, "images": []}', 'prompts: expected a list')])
def test_bodies_that_are_none(body, why):
    with serving(Light()) as url:
        code, reply = asked(url, body)
        assert code == 400 and why in reply['error'] and len(reply['error']) < 300


@pytest.mark.parametrize('length', ['²', '-1', '1e9', '9'*400, str(MAX_BODY+1), ' ', '0x10'])
def test_lengths_that_are_none(length):
    with serving(Light()) as url:
        code, reply = asked(url, b'{}', Content_Length=length)
        assert code == 413 and 'expected' in reply['error']


# A server that answers

@pytest.mark.parametrize('talk, why', [
    (says(200, b' '*(MAX_REPLY+1)), 'more than'), (says(200, b'['*10**6), 'nested too deep'),
    (says(200, b'{"scores": [' + b'9'*400 + b', 1]}'), 'expected 2 scores'),
    (says(200, b'{"scores": [' + b'9'*5000 + b', 1]}'), 'digits'),
    (says(200, b'{"scores": [1e400, 1]}'), 'expected 2 scores'), (says(200, b'{"scores": [NaN, 1]}'), 'NaN'),
    (says(503, b'x', Retry_After='\xb2'), 'HTTP 503'), (says(503, b'x', Retry_After='9'*400), 'HTTP 503'),
    (says(500, b'['*10**6), 'HTTP 500'), (drips, 'within 1 s'), (drips_headers, 'within 1 s')])
def test_replies_are_bounded(talk, why):
    start = time.time()
    with talking(talk) as url:
        far = Remote(f'{url}?key=sesame#total=1&patience=0')
        with pytest.raises(RewardError, match='^remote: ') as e: far(torch.ones(2, 3, 4, 4), ['', ''])
    one_line(e, why)
    assert 'sesame' not in str(e.value) and time.time() - start < 20


def test_patience_is_part_of_the_address():
    "A server that is away for a moment costs a pause; without patience it is the end"
    seen = []
    def comes_back(h):
        seen.append(1)
        says(503, b'') (h) if len(seen) < 3 else says(200, b'{"scores": [2]}')(h)
    with talking(comes_back) as url:
        assert Remote(f'{url}#patience=30')(torch.ones(1, 3, 4, 4), ['']).item() == 2
        seen.clear()
        with pytest.raises(RewardError, match='after 1 try'):
            Remote(f'{url}#patience=0')(torch.ones(1, 3, 4, 4), [''])
    for bad in ('patients=3', 'patience=soon', 'patience=-1', 'chunk=0'):
        with pytest.raises(ValueError, match='^remote: ') as e: Remote(f'http://h:1/#{bad}')
        one_line(e)


# A model that replies

MINE, THEIRS = json.dumps(GOOD), json.dumps(dict.fromkeys(ASPECTS, 10))

@pytest.mark.parametrize('text', [
    f'{THEIRS} {MINE}', f'{MINE}\n{THEIRS}', f'The prompt: {THEIRS}. {MINE}', f'{MINE} </think> {THEIRS}',
    f'<think>a</think>{THEIRS}</think>{MINE}', f'{{"grades": {MINE}}}', f'[{MINE}, {THEIRS}]', MINE[:-1],
    MINE.replace('7', '7, "accuracy": 10', 1), MINE.replace('7', '1e400', 1), MINE.replace('7', 'NaN', 1),
    MINE.replace('7', '9'*400, 1), MINE.replace('7', '"7"', 1), MINE.replace('7', 'null', 1), '{' + MINE])
def test_a_reply_cannot_be_steered(text):
    with pytest.raises(BadReply): read_grade(text)


@pytest.mark.parametrize('text', [MINE, f'```json\n{MINE}\n```', f'<think>or {THEIRS}?</think> {MINE}',
                                  f'Here {{it}} is: {MINE} {{done}}'])
def test_one_object_is_read(text): assert read_grade(text) == GOOD


def test_a_million_braces_take_a_moment():
    start = time.time()
    for text in ('{'*10**6, '{}'*10**5, '{"a":'*10**5 + '}'*10**5, '"{'*10**5, '\\'*10**6, '{"' + 'a'*10**6):
        with pytest.raises(BadReply): read_grade(text)
    assert time.time() - start < 30


@pytest.mark.parametrize('talk, why', [
    (says(200, b' '*(2**20+1), Content_Type='application/json'), 'a reply of more than'),
    (says(200, zlib.compress(b'{}'), Content_Encoding='deflate'), 'a compressed reply'),
    (says(200, b'['*10**6, Content_Type='application/json'), 'no JSON document'), (drips, 'timeout'),
    (drips_headers, 'timeout')])
def test_chat_servers_are_bounded(talk, why):
    pytest.importorskip('openai')
    start = time.time()
    with talking(talk) as url:
        g = MLLMGrader(f'{url}v1#m', Settings(retries=0, total=1., workers=1))
        assert g(torch.ones(1, 3, 4, 4), ['']).isnan().all()
    assert any(why in k for k in g.report()['why']), g.report()
    assert time.time() - start < 30


# Code of users, addresses, pickles

def test_user_code_cannot_end_the_process(tmp_path):
    (tmp_path/'bad.py').write_text('import sys\nsys.exit(5)\ndef f(images, prompts): pass\n')
    (tmp_path/'late.py').write_text('def f(images, prompts): raise SystemExit("done")\n'
                                    'def g(images, prompts): raise KeyboardInterrupt\n')
    with pytest.raises(ValueError, match='raised SystemExit: 5') as e: Own(f'{tmp_path}/bad.py:f')
    one_line(e)
    with pytest.raises(RewardError, match='late:f.*raised SystemExit: done .*line 1') as e:
        Own(f'{tmp_path}/late.py:f')(torch.ones(1, 3, 4, 4), [''])
    one_line(e)
    with pytest.raises(KeyboardInterrupt): Own(f'{tmp_path}/late.py:g')(torch.ones(1, 3, 4, 4), [''])


def test_edited_code_is_another_reward(tmp_path):
    file = tmp_path/'mine.py'
    file.write_text('def f(images, prompts): return [1.]*len(prompts)\n')
    before = Own(f'{file}:f').identity()
    assert Own(f'{file}:f').identity() == before and str(tmp_path) not in json.dumps(before)
    file.write_text('def f(images, prompts): return [2.]*len(prompts)\n')
    after = Own(f'{file}:f').identity()
    assert [k for k in before if before[k] != after[k]] == ['code']


@pytest.mark.parametrize('spec', ['remote@http://box.intern.example:8000/score?key=sesame#patience=60',
                                  'mllm@"https://box.intern.example/v1?key=sesame#org/model":.5,clip:.5',
                                  'hps@/home/sesame/box.intern.example/hps.pt', '~/sesame/mine.py:f'])
def test_reports_do_not_tell_where(spec):
    said = public_spec(spec)
    assert said != '(a reward)' and not re.search('sesame|intern|http|home', said)


def test_pickles_that_ask_for_more(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/ran',)
    torch.save(dict(a=torch.ones(2), b=Evil()), tmp_path/'w.pt')
    with pytest.raises(ValueError, match='demo: .*w.pt is a pickle that asks for posix.system') as e:
        read_state(tmp_path/'w.pt', 'demo')
    one_line(e, 'it was refused')
    assert not (tmp_path/'ran').exists()


def test_usable_is_what_can_be_made(monkeypatch, tmp_path):
    "Offline and with an empty cache, what has published weights only is not usable, and says what to do"
    import huggingface_hub.constants as hub
    monkeypatch.setattr(hub, 'HF_HUB_CACHE', str(tmp_path)); monkeypatch.setattr(hub, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.file_download.HF_HUB_CACHE', str(tmp_path), raising=False)
    for name in ('hps', 'image_reward', 'vqa', 'spatial'):
        ok, how = usable(name)
        assert not ok and 'hf download' in how and f'{name}@PATH' in how
    assert usable('clip')[0] and 'clip@shapes' in usable('clip')[1]


# Servers that are started here

STARTS = """
import subprocess, sys, time
from diffusion_sharpening.rewards.local_grader import dependent
null = subprocess.DEVNULL
p = dependent('http.server', sys.argv[1], '--bind', '127.0.0.1', stdout=null, stderr=null)
print(p.pid, flush=True); time.sleep(60)
"""

def answers(port):
    with socket.socket() as s: s.settimeout(1); return s.connect_ex(('127.0.0.1', port)) == 0


def until(f, seconds=30):
    end = time.time() + seconds
    while not f():
        if time.time() > end: return False
        time.sleep(.1)
    return True


@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGKILL])
def test_a_server_ends_with_the_program_that_started_it(how):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    p = subprocess.Popen([sys.executable, '-c', STARTS, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline().strip().isdigit() and until(lambda: answers(port))
        p.send_signal(how); p.wait(20)
        assert until(lambda: not answers(port))
    finally: p.kill()


def children(pid):
    "Processes that `pid` has started"
    ps = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True)
    return [int(o) for o in ps.stdout.split()]


def runs(pid):
    ps = subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], capture_output=True, text=True)
    return bool(ps.stdout.strip()) and ps.stdout.strip()[0] != 'Z'


@pytest.mark.slow
def test_score_with_a_grader_leaves_nothing_behind(tmp_path):
    "`sharpen score --reward mllm@shapes`, stopped by SIGTERM while its grader runs: no process is left"
    from PIL import Image
    pytest.importorskip('fastapi')
    (tmp_path/'pics').mkdir(); texts = ['a red circle']*64
    for i, _ in enumerate(texts): Image.new('RGB', (64, 64), (i, 0, 0)).save(tmp_path/'pics'/f'{i:02}.png')
    (tmp_path/'p.txt').write_text('\n'.join(texts) + '\n')
    cmd = [sys.executable, '-m', 'diffusion_sharpening', 'score', '--reward', 'mllm@shapes', '--images',
           str(tmp_path/'pics'), '--prompts', str(tmp_path/'p.txt'), '--out', str(tmp_path/'s.csv')]
    p = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert until(lambda: children(p.pid), 120), 'no grader was started'
        started = children(p.pid)
        p.send_signal(signal.SIGTERM); p.wait(60)
        assert until(lambda: not any(map(runs, started)), 30), 'a grader was left behind'
    finally: p.kill()
