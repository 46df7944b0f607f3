#!/usr/bin/env python
"Train on two rewards, one of them the grader served here: writes `data/results/rewards-train-mllm.json`"
import argparse, json, statistics, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root))
PRICES = dict(price_in=.15, price_out=.6, budget=1)   # per million tokens; the server here is free

def command(which, out, steps, n=4, batch=4):
    "Arguments of `sharpen` for a training on the CLIP score and the grader"
    url, _, model = which.partition('#')
    grader = f'mllm@"{url}?{"&".join(f"{k}={v}" for k, v in PRICES.items())}#{model}"'
    return ['train', 'rlhf', '--reward', f'clip@shapes:.5,{grader}:.5', '--steps', str(steps), '--heldout',
            '24',
            '--S-eval', '10', '--out', str(out), '--set', f'n={n}', f'batch={batch}', 'S=10']

def spread(x): return dict(mean=round(statistics.mean(x), 2), least=round(min(x), 2), most=round(max(x), 2))

def record(folder, steps):
    "What the run's own report and log say"
    rep = json.loads((folder/'report.json').read_text())
    rows = [json.loads(l) for l in (folder/'metrics.jsonl').read_text().splitlines()]
    judge, made, run = rep['judges']['mllm'], rep['settings']['method'], rep['settings']['run']
    return dict(method='rlhf', rewards='clip@shapes:.5, mllm:.5', batches=rep['batches'],
                skipped=rep['skipped'],
                pictures_per_batch=made['n']*run['batch'],
                seconds_per_batch=spread([sum(v for k, v in r.items() if k.startswith('ms/'))/1000
                                          for r in rows]),
                seconds_reward_per_batch=spread([r['ms/reward']/1000 for r in rows]), seconds=rep['seconds'],
                grader=judge,
                spent_as_if=dict(of_a_million_tokens=PRICES, spent=round(judge['spent'], 6)),
                reward={k: rep[k]['judges'][rep['judge']]['overall'] for k in ('before', 'after', 'delta')},
                checker_change=rep['delta']['judges']['checker']['overall'], alarms=rep['alarms']['rang'])

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--steps', type=int, default=6, help='batches (default %(default)s)')
    steps = p.parse_args().steps
    import torch
    from diffusion_sharpening.commands import cli
    from results import write
    from diffusion_sharpening.rewards.local_grader import serve
    from diffusion_sharpening.worlds.world import weights
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d, serve(weights('shapes-grader'), wait=1200) as which:
        start = time.time()
        if cli.run(command(which, Path(d)/'run', steps)): sys.exit('the training failed')
        what = 'sharpen train rlhf with the CLIP score and the grader behind `transformers serve`, end to end'
        about = dict(what=what, seed=0, server_threads=1, wall_s=round(time.time()-start, 1))
        write('rewards-train-mllm', about | record(Path(d)/'run', steps), ['openai'])

if __name__ == '__main__': main()
