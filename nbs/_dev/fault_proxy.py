#!/usr/bin/env python
"A proxy before an OpenAI-compatible server that misbehaves as asked: `fault_proxy.py URL FAULT…`"
import argparse, json, threading, time, urllib.error, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = dict(
    busy='429 with Retry-After: 1', broken='500', hang='no reply', drop='closes the connection',
    html='200, but a web page', torn='200, but half a JSON document',
    garbage='a chatty reply without a grade',
    empty='no choices', refusal='a refusal', cut='a reply cut off at half its length', huge='grades of 11',
    key='401 that repeats the key', schema='400 whenever a request has a response_format',
    policy='400 for this picture')
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

def completion(text, how='stop'):
    "A chat completion that says `text`"
    choice = dict(index=0, finish_reason=how, message=dict(role='assistant', content=text))
    usage = dict(prompt_tokens=900, completion_tokens=60, total_tokens=960)
    return dict(id='1', object='chat.completion', created=0, model='m', choices=[choice], usage=usage)

class FaultProxy:
    "Requests meet `faults` in turn (None: none); what passes goes to the server `upstream`, or to `answer`"
    def __init__(self, faults=(), upstream=None, answer=None, hang=30.):
        self.faults, self.upstream, self.answer, self.hang = list(faults), upstream, answer, hang
        self.seen, self.flying, self.most = [], 0, 0      # (fault, body) of each request; requests in flight
        self.lock, self.stop = threading.Lock(), threading.Event()
        unknown = {f for f in self.faults if f} - set(FAULTS)
        if unknown: raise ValueError(f'expected faults out of {", ".join(FAULTS)}, found {unknown}')

    def __enter__(self):
        proxy = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def log_message(self, *args): pass
            def do_POST(self): proxy.handle(self)
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(.05,), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}/v1'
        return self

    def __exit__(self, *args):
        self.stop.set(); self.server.shutdown(); self.server.server_close()

    def handle(self, http):
        "Answer one request"
        body = json.loads(http.rfile.read(int(http.headers['Content-Length'])))
        with self.lock:
            fault = self.faults.pop(0) if self.faults else None
            self.seen.append((fault, body)); self.flying += 1; self.most = max(self.most, self.flying)
        try: self.reply(http, *self.act(fault, body, http))
        except (OSError, TypeError): http.close_connection = True
        finally:
            with self.lock: self.flying -= 1

    def act(self, fault, body, http):
        "Status, what is sent, and headers; None: nothing is sent"
        key = http.headers.get('Authorization', '')
        if fault == 'hang': self.stop.wait(self.hang)
        if fault in ('hang', 'drop'): return None
        if fault == 'schema': self.faults += ['schema']    # this server never learns
        if fault == 'schema' and 'response_format' in body: return 400, dict(error='response_format?')
        simple = dict(busy=(429, dict(error='busy'), {'Retry-After': '1'}), broken=(500, dict(error='down')),
                      html=(200, '<html>Welcome</html>', {'Content-Type': 'text/html'}),
                      torn=(200, '{"id": "1", "cho'),
                      garbage=(200, completion('What a lovely picture! 10 out of 10 from me.')),
                      empty=(200, completion('') | dict(choices=[])),
                      key=(401, dict(error=dict(message=f'wrong key: {key}'))),
                      policy=(400, dict(error=dict(message=f'content policy; you sent {key}'))))
        return simple[fault] if fault in simple else (200, self.spoil(fault, self.forward(body, key)))

    def forward(self, body, key):
        "What the server behind says"
        if self.upstream is None: return completion(self.answer(body))
        headers = {'Content-Type': 'application/json', 'Authorization': key}
        url, data = f'{self.upstream}/chat/completions', json.dumps(body).encode()
        with direct.open(urllib.request.Request(url, data, headers), timeout=120) as r: return json.load(r)

    def spoil(self, fault, out):
        "A good reply, made a bad one"
        choice = out['choices'][0]; message = choice['message']
        text = message['content']
        if fault == 'refusal': message.update(content=None, refusal='I cannot judge this.')
        if fault == 'cut': message['content'] = text[:len(text)//2]; choice['finish_reason'] = 'length'
        if fault == 'huge': message['content'] = json.dumps(dict.fromkeys(json.loads(text), 11))
        return out

    def reply(self, http, status, what, headers={}):
        "Send it"
        data = (what if isinstance(what, str) else json.dumps(what)).encode()
        http.send_response(status)
        for k, v in ({'Content-Type': 'application/json', 'Content-Length': len(data)} | headers).items():
            http.send_header(k, str(v))
        http.end_headers(); http.wfile.write(data)

def main():
    p = argparse.ArgumentParser(description=__doc__, epilog='; '.join(f'{k}: {v}' for k, v in FAULTS.items()))
    p.add_argument('url', help='of the real server, up to /v1')
    p.add_argument('faults', nargs='*', choices=list(FAULTS))
    args = p.parse_args()
    with FaultProxy(args.faults, args.url) as proxy:
        print(proxy.url, flush=True)
        while True: time.sleep(60)

if __name__ == '__main__': main()
