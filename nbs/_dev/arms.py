"Methods and presets to measure, as the scripts that go through all of them are asked for them"
import argparse
from dataclasses import asdict
from diffusion_sharpening.basics.words import one_of
from diffusion_sharpening.methods.catalog import METHODS, find, presets

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
