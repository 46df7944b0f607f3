#!/usr/bin/env python
"""ImageReward at full size on random weights: both backends side by side, with times and memory.

`python nbs/_dev/rewards_image_reward.py` writes data/results/rewards-image_reward.json (about 2 GB of disk
and 5 GB of memory for a few minutes); it needs `pip install --no-deps image-reward==1.5`."""
import argparse, gc, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root))
import torch
import torch.nn.functional as F
from diffusion_sharpening.rewards.image_reward import PUBLISHED, BlipJudge, ImageReward, rename
from diffusion_sharpening.worlds.shapes.draw import picture, prompts
from results import write

def random_checkpoint(folder):
    "A checkpoint with the keys and shapes of ImageReward.pt and weights that pictures and words get through"
    with torch.device('meta'): state = BlipJudge(PUBLISHED).state_dict()
    shapes = {rename(k, back=True): v.shape for k, v in state.items()}
    shapes |= {'blip.vision_proj.weight': (256, 1024), 'blip.vision_proj.bias': (256,),
               'blip.text_proj.weight': (256, 768), 'blip.text_proj.bias': (256,)}
    g, state = torch.Generator().manual_seed(0), {}
    for k, shape in shapes.items():
        matrix = len(shape) > 1 and k.endswith('.weight') and 'embeddings' not in k
        spread = torch.Size(shape[1:]).numel()**-.5 if matrix else .05
        state[k] = torch.randn(shape, generator=g)*spread + (k.endswith('.weight') and len(shape) == 1)
    state['blip.text_encoder.embeddings.position_ids'] = torch.arange(512)[None]
    torch.save(state, folder/'ImageReward.pt')

def vocabulary(folder, texts):
    "As many words as bert-base-uncased has, its special tokens at their places"
    words = sorted({w for t in texts for w in t.replace(',', ' ,').replace('.', ' .').lower().split()})
    rows = ['[PAD]'] + [f'[unused{i}]' for i in range(99)] + '[UNK] [CLS] [SEP] [MASK]'.split() + words
    (folder/'vocab.txt').write_text('\n'.join(rows + [f'##filler{i}' for i in range(30522 - len(rows))]))

def memory(pid='self'):
    "Peak memory of a process in GB"
    line = next(o for o in Path(f'/proc/{pid}/status').read_text().splitlines() if o.startswith('VmHWM'))
    return round(int(line.split()[1])/1e6, 2)

def forget_peak():
    "Start to measure the peak memory of this process anew"
    Path('/proc/self/clear_refs').write_text('5')

def clocked(f):
    start = time.perf_counter(); res = f()
    return res, round(time.perf_counter() - start, 2)

def compare(folder):
    "Scores of both backends on the same pictures, and what they cost"
    texts = prompts(4, 'train', seed=3)
    random_checkpoint(folder); vocabulary(folder, texts)
    ims = torch.stack([picture(t, i) for i, t in enumerate(texts)])
    ims = F.interpolate(ims, (224, 224), mode='bicubic', antialias=True).clamp(0, 1)
    ims = (ims*255).round()/255                                  # what the wheel can take
    wide = (F.interpolate(ims[:2], (300, 400), mode='bicubic', antialias=True).clamp(0, 1)*255).round()/255
    gc.collect(); forget_peak()
    reward, load = clocked(lambda: ImageReward(folder))
    ours, batch = clocked(lambda: reward(ims, texts))
    single, one = clocked(lambda: torch.cat([reward(ims[i:i+1], texts[i:i+1]) for i in range(2)]))
    ours_wide = reward(wide, texts[:2])
    x = ims[:1].clone().requires_grad_()
    _, grad = clocked(lambda: reward(x, texts[:1]).sum().backward())
    peak = memory()
    del reward; gc.collect()
    stock, start = clocked(lambda: ImageReward(folder, backend='package'))
    theirs, loop = clocked(lambda: stock(ims, texts))
    theirs_wide = stock(wide, texts[:2])
    child = memory(stock.judge.child.pid); stock.judge.close()
    def gap(a, b): return float(f'{(a - b).abs().max().item():.2e}')
    return dict(scores=[round(o, 5) for o in ours.tolist()], spread=round(ours.std().item(), 4),
        max_abs_diff=gap(ours, theirs), max_abs_diff_resized=gap(ours_wide, theirs_wide),
        max_abs_diff_batch_single=gap(ours[:2], single), gradient_norm=round(x.grad.norm().item(), 4),
        transformers=dict(load_s=load, s_per_image_batch_4=round(batch/4, 2),
                          s_per_image_single=round(one/2, 2),
                          s_forward_backward=grad, peak_gb=peak),
        package=dict(load_s=start, s_per_image=round(loop/4, 2), peak_gb=child))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--dir', help="where to put the checkpoint of 1.8 GB (default: a temporary folder)")
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.dir) as tmp: res = compare(Path(tmp))
    what = 'ImageReward, random weights of the published sizes, 4 pictures'
    write('rewards-image_reward', dict(what=what) | res, ['timm', 'image-reward'])

if __name__ == '__main__': main()
