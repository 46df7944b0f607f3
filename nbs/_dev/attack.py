#!/usr/bin/env python
"""Attack the library as a careless or hostile user would: `python nbs/_dev/attack.py [GROUP …]`

Every attack is a command line, or a setting, with what it must end in: the work done right, or one line, an
exit code that is not 0, and nothing lost. The summary goes to data/results/attack.json (not with --dry).
With --parts FILE each group is written there when it is done, and is not tried again by the same commit."""
import argparse, json, sys, tempfile, time
from pathlib import Path
import attack_inputs, attack_runs, attack_servers
from attacking import GROUPS, Kit, attempt
from results import origin, write
from diffusion_sharpening.basics.files import write_json
from diffusion_sharpening.basics.words import one_of


def attacked(name, kit, every):
    "How many attacks of a group were tried and held, and what did not hold"
    (made, slow), t0, failed, tried = GROUPS[name], time.time(), {}, 0
    for what, attack in [*made()][every//2*slow::every if slow else 1]:
        tried += 1
        if why := attempt(attack, kit):
            failed[what] = why
            print(f'  {what!r:.60}: {why:.300}', flush=True)
    print(f'{name:34}{tried-len(failed):>5} of {tried} held{time.time()-t0:>8.0f} s', flush=True)
    return dict(tried=tried, held=tried-len(failed), seconds=round(time.time()-t0), failed=failed)


def parts(file, todo, kit, every):
    "Each group by its name, those of the file as they were found there"
    said = dict(git_commit=origin()['git_commit'], every=every)
    known = json.loads(file.read_text()) if file and file.exists() else said | dict(groups={})
    if {k: known[k] for k in said} != said: raise SystemExit(f'{file}: expected groups of {said}')
    for name in todo:
        if name in known['groups']: continue
        known['groups'][name] = attacked(name, kit, every)
        if file: write_json(file, known)
    return {name: known['groups'][name] for name in todo}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('groups', nargs='*', help=f"default: all of {', '.join(GROUPS)}")
    p.add_argument('--every', type=int, default=1, metavar='N', help='try one in N of the slow ones')
    p.add_argument('--parts', type=Path, metavar='FILE', help='groups that are done; goes on from there')
    p.add_argument('--dry', action='store_true', help='write no summary')
    a = p.parse_args()
    try: todo = [one_of(g, list(GROUPS), 'group') for g in a.groups or GROUPS]
    except ValueError as e: p.error(str(e))
    with tempfile.TemporaryDirectory() as d: found = parts(a.parts, todo, Kit(d), a.every)
    tried, held, seconds = (sum(g[k] for g in found.values()) for k in ('tried', 'held', 'seconds'))
    line = f'tried {tried}, held {held}' + f'; of the slow ones one in {a.every}'*(a.every > 1)
    print(line)
    if not a.dry: write('attack', dict(tried=tried, held=held, every=a.every, summary=line,
                                       seconds=seconds, groups=found))
    sys.exit(tried != held)

if __name__ == '__main__': main()
