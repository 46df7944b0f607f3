#!/usr/bin/env python
"""Attack the library as a careless or hostile user would: `python nbs/_dev/attack.py [GROUP …]`

Every attack is a command line, or a setting, with what it must end in: the work done right, or one line, an
exit code that is not 0, and nothing lost. The summary goes to data/results/attack.json (not with --dry)."""
import argparse, sys, tempfile, time
import attack_inputs, attack_runs, attack_servers
from attacking import GROUPS, Kit, attempt
from results import write
from diffusion_sharpening.basics.words import one_of


def attacked(name, kit, every):
    "How many attacks of a group were tried and held, and what did not hold"
    (made, slow), t0, failed, tried = GROUPS[name], time.time(), {}, 0
    for what, attack in [*made()][every//2*slow::every if slow else 1]:
        tried += 1
        if why := attempt(attack, kit):
            failed[what] = why
            print(f'  {what!r:.60}: {why:.300}', flush=True)
    print(f'{name:24}{tried-len(failed):>5} of {tried} held{time.time()-t0:>8.0f} s', flush=True)
    return dict(tried=tried, held=tried-len(failed), failed=failed)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('groups', nargs='*', help=f"default: all of {', '.join(GROUPS)}")
    p.add_argument('--every', type=int, default=1, metavar='N', help='try one in N of the slow ones')
    p.add_argument('--dry', action='store_true', help='write no summary')
    a = p.parse_args()
    try: todo = [one_of(g, list(GROUPS), 'group') for g in a.groups or GROUPS]
    except ValueError as e: p.error(str(e))
    t0 = time.time()
    with tempfile.TemporaryDirectory() as d:
        kit = Kit(d)
        found = {name: attacked(name, kit, a.every) for name in todo}
    tried, held = (sum(g[k] for g in found.values()) for k in ('tried', 'held'))
    line = f'tried {tried}, held {held}' + f'; of the slow ones one in {a.every}'*(a.every > 1)
    print(line)
    if not a.dry: write('attack', dict(tried=tried, held=held, every=a.every, summary=line,
                                       seconds=round(time.time()-t0), groups=found))
    sys.exit(tried != held)

if __name__ == '__main__': main()
