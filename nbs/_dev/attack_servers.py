"Attacks over HTTP: servers that answer with harm, and clients that mean harm to serve-reward"
import base64, io, json, os, re, signal, socket, struct, threading, time, zlib
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPException
from socketserver import BaseRequestHandler, ThreadingTCPServer
from attacking import Child, group, sharpen, trouble
from fault_proxy import FAULTS, FaultProxy
from PIL import Image

@contextmanager
def talking(talk):
    "A server that reads a whole request, then calls `talk(socket, number of the request)`; gives its address"
    seen = []
    class Handler(BaseRequestHandler):
        def handle(self):
            try:
                self.request.settimeout(20)
                data = b''
                while b'\r\n\r\n' not in data and (part := self.request.recv(1 << 16)): data += part
                head, _, body = data.partition(b'\r\n\r\n')
                size = int((re.search(rb'content-length: (\d+)', head, re.I) or [0, 0])[1])
                while len(body) < size: body += self.request.recv(1 << 16)
                seen.append(1)
                talk(self.request, len(seen))
            except OSError: pass
    class Server(ThreadingTCPServer): daemon_threads, block_on_close, allow_reuse_address = True, False, True
    with Server(('127.0.0.1', 0), Handler) as s:
        threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
        yield f'127.0.0.1:{s.server_address[1]}'
        s.shutdown()

def says(body=b'', status=b'200 OK', head=b'', length=None):
    n = len(body) if length is None else length
    told = b'' if n < 0 else b'Content-Length: %d\r\n' % n
    full = b'HTTP/1.1 ' + status + b'\r\n' + head + told + b'\r\n' + body
    return lambda s, k: s.sendall(full)

def drips(first, byte, pause):
    def talk(s, k):
        s.sendall(first)
        for _ in range(2000): s.sendall(byte); time.sleep(pause)
    return talk

def reset(s, k): s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.close()
def silent(s, k): time.sleep(20)
def floods(s, k):
    s.sendall(b'HTTP/1.1 200 OK\r\n\r\n')
    while True: s.sendall(b'[' * (1 << 20))
def head_floods(s, k):
    s.sendall(b'HTTP/1.1 200 OK\r\n')
    while True: s.sendall(b'X: ' + b'y'*60_000 + b'\r\n')
def zipped(s, k):
    body = zlib.compress(b'[' * 10**8)
    s.sendall(b'HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\n'
              b'Content-Length: %d\r\n\r\n' % len(body) + body)
def chunked(text): return says(text, head=b'Transfer-Encoding: chunked\r\n', length=-1)
def scores(*v): return says(json.dumps(dict(scores=v)).encode())
def raw(text): return says(b'{"scores": ' + text + b'}')
def sometimes(good, bad): return lambda s, k: (good if k % 2 else bad)(s, k)

REPLIES = {
    'nothing': says(), 'no length': says(b'{"scores": [1, 2]', length=-1),
           'too short': says(b'{"scores"', length=99),
    'web page': says(b'<html>Hello</html>'), 'deep': says(b'['*10**6), 'deep scores': raw(b'['*10**6),
    'deep objects': says(b'{"a":'*10**5), '400 digits': raw(b'[' + b'9'*400 + b', 1]'),
           '5000 digits': raw(b'[' + b'9'*5000 + b', 1]'),
    '400 digits after a point': raw(b'[0.' + b'9'*400 + b', null]x'), '1e400': raw(b'[1e400, 1]'),
           'NaN': raw(b'[NaN, 1]'),
    'Infinity': raw(b'[Infinity, 1]'), 'texts': raw(b'["1", "2"]'), 'truth': raw(b'[true, false]'),
           'lists': raw(b'[[1], [2]]'),
    'objects': raw(b'[{"score": 1}, 2]'), 'a number': raw(b'3'), 'a dict': raw(b'{"0": 1, "1": 2}'),
           'one too few': scores(1),
    'one too many': scores(1, 2, 3), 'a million': raw(b'[' + b'1,'*10**6 + b'1]'), 'none at all': scores(),
           'list on top': says(b'[1, 2]'),
    'null on top': says(b'null'), 'twice': says(b'{"scores": [1], "scores": [1, 1, 1]}'),
           'latin': says(b'{"scores": [1, 2], "a": "\xe9"}', length=9),
    'utf-16': says('{"scores": [1]}'.encode('utf-16')), 'zero bytes': says(b'\0'*1000),
           '600 MB announced': says(b'[', length=6*10**8),
    'flood': floods, 'flood of headers': head_floods, 'compressed bomb': zipped,
           'drips': drips(b'HTTP/1.1 200 OK\r\n\r\n', b' ', .02),
    'drips of headers': drips(b'', b'H', .02),
           'drips of a header': drips(b'HTTP/1.1 200 OK\r\nA: ', b'H', .02), 'reset': reset,
    'silent': silent, 'not HTTP': lambda s, k: s.sendall(b'SSH-2.0-OpenSSH_9\r\n'), 'HTTP 0.9': lambda s,
           k: s.sendall(b'{}'),
    'bad status': says(status=b'9999999999 x'), 'word for status': says(status=b'abc OK'),
           'continue for ever': lambda s, k: [
        s.sendall(b'HTTP/1.1 100 Continue\r\n\r\n') for _ in range(10**5)],
           'switching': says(status=b'101 Switching Protocols'),
    'no content': says(status=b'204 No Content'),
           'redirect': says(status=b'302 Found', head=b'Location: http://169.254.169.254/\r\n'),
    'redirect to a file': says(status=b'307 x', head=b'Location: file:///etc/passwd\r\n'),
           'redirect to itself': says(
        status=b'301 x', head=b'Location: /\r\n'),
           'wants a key': says(b'{"error": "key"}', b'401 x', b'WWW-Authenticate: Basic\r\n'),
    'busy, odd wait': says(b'{}', b'503 x', 'Retry-After: ²\r\n'.encode('latin1')), 'busy for ever': says(
        b'{}', b'429 x', b'Retry-After: ' + b'9'*400 + b'\r\n'), 'busy until a date': says(
        b'{}', b'503 x', b'Retry-After: Fri, 31 Dec 9999 23:59:59 GMT\r\n'), 'busy, less than none': says(
        b'{}', b'503 x', b'Retry-After: -1\r\n'), 'deep error': says(b'['*10**6, b'500 x'),
           'long error': says(
        json.dumps(dict(error='x'*10**6)).encode(), b'422 x'), 'error of lines': says(
        json.dumps(dict(error='a\nsharpen: b\n\x1b[2J\x07c')).encode(), b'400 x'),
           'error that is a list': says(b'{"error": [[[]]]}', b'400 x'),
    'chunks without end': chunked(b'5\r\n'), 'chunk of minus one': chunked(b'-1\r\n'),
           'chunk of 2**70': chunked(b'400000000000000000\r\nx'),
    'chunk of words': chunked(b'zz\r\nxx\r\n'), 'all null, always': raw(b'[null, null]')}

def asked(talk, spec, wait, kit):
    "One line that names the reward, soon, and without the memory of this machine"
    with talking(talk) as host:
        end = sharpen(*kit.score(spec.format(host), kit.place()/'o'), wait=wait)
    why = trouble(end, 1, 2)
    if not why and re.search('[\x00-\x08\x0b-\x1f\x7f]',
                             end.last()): why = f'control characters in {end.last()!r:.150}'
    return why or ('' if re.search('remote|mllm', end.last()) else f'no name in {end.last():.150}')

def spoiled(fault, kit):
    "A grader that misbehaves in one way for ever: said in one line, or its pictures count as failed"
    with FaultProxy([fault]*50, answer=lambda body: '{}', hang=20.) as proxy:
        argv = kit.score(f'mllm@{proxy.url}#m', kit.place()/'o')
        end = sharpen(*argv, wait=60, env=dict(OPENAI_API_KEY='sesame-key'))
    return trouble(end, 0, 1, 2) or ('it tells the key' if 'sesame' in end.out + end.err else '')

@group(slow=True)
def hostile_servers():
    for name, talk in REPLIES.items():
        if name != 'all null, always': yield f'remote: {name}', partial(
            asked, talk, 'remote@http://{}/#patience=0&total=3&timeout=2', 30)
    for fault in FAULTS:
        if fault not in ('hang',): yield f'mllm: {fault}', partial(spoiled, fault)

def trained(talk, kit):
    "A training whose reward server goes bad: saved, and gone on with when the server is well"
    d = kit.place()
    bad = lambda s, k: scores(*[.1, .2, .3, .4])(s, k) if k <= 3 else talk(s, k)
    with talking(bad) as host:
        more = f'remote@http://{host}/#patience=0&total=3&timeout=2&chunk=99'
        end = sharpen(*kit.train(d/'r', 4, reward=more))
    return trouble(end, 1, 2)


# serve-reward

def png(side, idat=None, depth=1, more=b''):
    "A black PNG that says it has `side` × `side` pixels"
    def chunk(kind, data):
        return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    z = zlib.compressobj(9)
    if idat is None: idat = b''.join(z.compress(bytes(1 + side//8 + 1)) for _ in range(side)) + z.flush()
    head = chunk(b'IHDR', side.to_bytes(4, 'big')*2 + bytes([depth, 0, 0, 0, 0]))
    return (b'\x89PNG\r\n\x1a\n' + head + more + chunk(b'IDAT', idat) + chunk(b'IEND', b''))

def text_bomb():
    data = b'Comment\0\0' + zlib.compress(bytes(3*10**8), 9)
    sum = zlib.crc32(b'zTXt' + data).to_bytes(4, 'big')
    return png(8, more=len(data).to_bytes(4, 'big') + b'zTXt' + data + sum)

def picture(kind='PNG', size=(64, 64), mode='RGB', **how):
    Image.new(mode, size, 99).save(buf := io.BytesIO(), kind, **how)
    return buf.getvalue()

def request(files, prompts=None):
    files = [base64.b64encode(f).decode() for f in files]
    return json.dumps(dict(prompts=prompts or ['a dog']*len(files), images=files)).encode()

def posted(port, body, **head):
    "Status and bytes of a reply"
    c = HTTPConnection('127.0.0.1', port, timeout=30)
    c.putrequest(head.pop('method', 'POST'), '/score')
    for k, v in ({'Content-Length': str(len(body))} | head).items(): c.putheader(k, v)
    c.endheaders(body)
    r = c.getresponse()
    return r.status, r.read()

def sent(port, data, wait=3):
    "Raw bytes; the first of what comes back"
    with socket.create_connection(('127.0.0.1', port), timeout=wait) as s:
        try: s.sendall(data); return s.recv(1000)
        except OSError: return b''

def bombs():
    "Name → function of the port that sends it"
    post = lambda body, **head: lambda port: posted(port, body, **head)
    out = {f'PNG of {n} × {n}': post(request([png(n)]*k)) for n, k in ((13000, 3), (16000, 1), (4096, 9))}
    out |= {f'{k} of 60000 × 60000': post(request([d])) for k, d in dict(
        GIF=b'GIF89a' + struct.pack('<HH', 60000,
                                    60000) + b'\0\0\0,' + struct.pack('<HHHH', 0, 0, 60000,
                                                60000) + b'\0\2\0;',
        BMP=b'BM' + struct.pack('<IHHIIiiHHIIiiII', 99, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0,
                                0)).items()}
    out |= {'PNG, side 2**31': post(request([png(2**31-1, b'')])),
            'PNG without pixels': post(request([png(0, b'')])),
            'PNG, no data': post(request([png(64, b'')])),
            'PNG, a bomb of text': post(request([text_bomb()])),
            'PNG cut': post(request([picture()[:90]])), '16 bit': post(request([picture(mode='I;16')])),
            'SVG': post(request([b'<svg onload="x"/>'])),
            'EPS': post(request([b'%!PS-Adobe-3.0 EPSF-3.0\n(x) run'])),
            'PDF': post(request([b'%PDF-1.4'])),
            'moving': post(request([picture('GIF', save_all=True, append_images=[
                Image.new('L', (64, 64), i) for i in range(50)])])), 'no pictures': post(request([])),
            'empty pictures': post(request([b''])),
            '10 000 pictures': post(request([picture(size=(1, 1))]*10_000)),
            'a prompt of 10 MB': post(request([picture()], ['x'*10**7])),
            'half characters': post(request([picture()], ['\ud800'])),
            'deep': post(b'['*10**6), 'digits': post(b'{"prompts": ' + b'9'*10**6 + b'}'),
            'not JSON': post(b'\xff'),
            'empty': post(b''), 'null': post(b'null'),
            'no base64': post(json.dumps(dict(prompts=['a'], images=['é'])).encode()),
            'a path for a picture': post(json.dumps(dict(prompts=['a'], images=['/etc/passwd'])).encode()),
            'a million keys': post(json.dumps({str(i): i for i in range(10**6)}).encode()),
            'length of 10**12': post(b'{}', **{'Content-Length': str(10**12)}),
            'length of words': post(b'{}', **{'Content-Length': 'x'}),
            'length of minus one': post(b'{}', **{'Content-Length': '-1'}), 'PUT': post(b'{}', method='PUT'),
            'DELETE': post(b'{}', method='DELETE'), 'a strange method': post(b'{}', method='X'*1000),
            'wrong key': post(request([picture()]), Authorization='Bearer x')}
    raw = {'half a request': b'POST /score HTTP/1.1\r\nContent-Length: 99\r\n\r\n{',
           'no HTTP': b'\x16\x03\x01\x02', 'nothing': b'',
           'long path': b'GET /' + b'x'*10**6,
           'headers without end': b'GET / HTTP/1.1\r\n' + b'A: b\r\n'*10**5,
           'long header': b'GET / HTTP/1.1\r\nA: ' + b'b'*10**7, 'zero bytes': b'\0'*10**5,
           'two lengths': b'POST / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 9999\r\n\r\n{}',
           'chunks': b'POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n',
           'version 9': b'GET / HTTP/9.9\r\n\r\n', 'pipelined': b'GET / HTTP/1.1\r\n\r\n'*1000}
    return out | {f'raw: {k}': partial(sent, data=v) for k, v in raw.items()} | {
        '200 connections that say nothing': many(b''),
        '100 slow requests': many(b'POST /score HTTP/1.1\r\nContent-Le')}

def many(data):
    def send(port):
        held = [socket.create_connection(('127.0.0.1', port),
                                         timeout=9) for _ in range(200 if not data else 100)]
        for s in held: s.sendall(data)
        good(port)
        for s in held: s.close()
    return send

def good(port): # The score that is expected, whatever was sent before
    code, body = posted(port, request([picture()]))
    found = json.loads(body)['scores']
    if code != 200 or abs(found[0] - 99/255) > .3: raise ValueError(f'{code}: {found}')

def high_water(pid):
    "kB of memory that a process had at most"
    return int(re.search(r'VmHWM:\s+(\d+)', open(f'/proc/{pid}/status').read())[1])

def bombed(kit):
    "One server for all: after each it answers a good request, and its memory stays; gives what did not hold"
    child = Child('serve-reward', '--reward', kit.reward, '--port', 0)
    until = time.monotonic() + 60
    while not (at := re.search(rb':(\d+)/score', child.said[1])) and time.monotonic() < until: time.sleep(.05)
    port, failed = int(at[1]), {}
    good(port)
    before = high_water(child.pid)
    for name, send in bombs().items():
        t0 = time.monotonic()
        try: send(port)
        except (OSError, HTTPException): pass
        try: good(port)
        except Exception as e: failed[name] = f'then no good answer: {type(e).__name__}: {e!s:.100}'
        if time.monotonic() - t0 > 30: failed[name] = f'{time.monotonic() - t0:.0f} s'
        grown, before = high_water(child.pid) - before, high_water(child.pid)
        if grown > 600_000: failed[name] = f'{grown/1e6:.2f} GB more'
    os.kill(child.pid, signal.SIGTERM)
    end = child.end(10**6)
    if why := trouble(end, 0, 143): failed['its end'] = why
    return failed

@group(slow=True)
def bombs_to_serve_reward():
    found = []
    def each(name, kit):
        if not found: found.append(bombed(kit))
        return found[0].get(name, '')
    for name in [*bombs(), 'its end']: yield name, partial(each, name)

PLACES = dict(taken=['--port', 'TAKEN'], low=['--port', 1], high=['--port', 65536], huge=['--port', 10**30],
              below=['--port', -1], elsewhere=['--host', '192.0.2.1'], no_host=['--host', 'nonsense.invalid'],
              all_without_key=['--host', '0.0.0.0'], six=['--host', '::'], empty=['--host', ''])

@group(slow=True)
def places_to_serve():
    def place(more, kit):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0)); s.listen()
            more = [str(s.getsockname()[1]) if m == 'TAKEN' else m for m in more]
            if more == ['--port', 1] and os.geteuid() == 0: return ''
            return trouble(sharpen('serve-reward', '--reward', kit.reward, *more, wait=20), 2)
    for name, more in PLACES.items(): yield name, partial(place, more)

BREAKS = {k: REPLIES[k] for k in ('nothing', 'reset', 'deep', 'one too few', 'NaN', 'all null, always',
                                  '400 digits', 'drips')}

@group(slow=True)
def servers_that_go_bad_in_a_training():
    for name, talk in BREAKS.items(): yield name, partial(trained, talk)
