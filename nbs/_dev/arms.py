"Methods and presets to measure, as the scripts that go through all of them are asked for them"
import argparse, json
from dataclasses import asdict
from diffusion_sharpening.basics.words import one_of
from diffusion_sharpening.methods.catalog import METHODS, find, presets
from results import folder, origin

def arms(names):
    "Name → method and preset; presets with equal settings once"
    out, seen = {}, []
    for name in names:
        for preset in sorted(presets(name), key='default'.__eq__):     # published variants keep their names
            made = find(name, preset)()
            same = type(made), asdict(made)
            if same in seen: continue
            seen.append(same)
            out[name if preset == 'default' else f'{name}, {preset}'] = name, preset
    return out

def asked(doc, **numbers):
    "The command line of a script: its options, and the arms to measure; `numbers`: name=(default, help)"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('methods', nargs='*', help='default: all')
    for name, (default, text) in numbers.items():
        p.add_argument(f'--{name}', type=int, default=default, help=text)
    p.add_argument('--dry', action='store_true', help='write no summary')
    a = p.parse_args()
    try: return a, arms([one_of(name, list(METHODS), 'method') for name in a.methods or METHODS])
    except ValueError as e: p.error(str(e))

def known(name, about):
    "Arms in data/results/NAME.json, if it was measured with these settings and by this code"
    file = folder/f'{name}.json'
    if not file.exists(): return {}
    was, now = json.loads(file.read_text()), about | {'git_commit': origin()['git_commit']}
    other = [k for k, v in now.items() if was.get(k) != v]
    if other: print(f'{file.name} is of another {other[0]}: all is measured anew', flush=True)
    return {} if other else was['arms']
