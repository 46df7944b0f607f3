#!/usr/bin/env python
"Train the grader of Shapes and put it into `data/shapes-grader`; after a stop it goes on where it was"
import argparse, shutil, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--work', default=root/'runs'/'shapes-grader', help='state, pictures and log of the run')
    p.add_argument('--out', default=root/'data'/'shapes-grader', help='where the weights go')
    args = p.parse_args()
    import torch
    from diffusion_sharpening.worlds.shapes.grader import train_grader
    torch.set_num_threads(1)
    net, _ = train_grader(args.work)
    made, out = Path(args.work)/'shapes-grader', Path(args.out)
    shutil.rmtree(out, ignore_errors=True); shutil.copytree(made, out)
    size = sum(f.stat().st_size for f in out.iterdir())
    print(f'{sum(q.numel() for q in net.parameters()):,} parameters, {size/1e6:.2f} MB in {out}, '
          f'{time.process_time():.0f} s of one core')
    if size > 1.5e6: sys.exit('grader_weights: expected at most 1.5 MB')

if __name__ == '__main__': main()
