#!/usr/bin/env python
"""Every method as its user types it: `python nbs/_dev/every_method.py [METHOD …] [--steps 20]`

`sharpen train METHOD --model shapes --reward clip` is run to its end, and again with an interrupt (Ctrl-C)
after a third of the batches, after which `--resume` goes on: both must end in the same weights, bit for bit.
Then plain diffusers loads the LoRA and must draw the pictures of `sharpen sample`: `gap` is the largest
difference of a pixel, of 255, and `gap_of_base` the same without the LoRA. The summary goes to
data/results/every_method.json (not with --dry); a method that was measured whole, as runs/every tells, is not
measured again."""
import json, shutil, signal, time
from pathlib import Path
import torch
from arms import asked
from end_to_end import Process, plain
from diffusion_sharpening.commands.load import quiet
from diffusion_sharpening.basics.files import digest, read_json, write_json
from diffusion_sharpening.basics.pictures import read_picture
from diffusion_sharpening.models.hand_over import switch_off, switch_step
from diffusion_sharpening.models.lora import lora_file
from diffusion_sharpening.worlds.world import weights
from results import origin, write

PICTURES, S, CLOSE = 4, 10, .6          # CLOSE: of 255, the rounding of a picture in a file

def check(end, code, *argv):
    "SystemExit where a command line ended in another way"
    if end.code != code: raise SystemExit(f"sharpen {' '.join(map(str, argv))}: {end.code}: {end.err[-800:]}")

def done(*argv): check(Process(*argv).end(1e5), 0, *argv)

def lines(file): return len(file.read_text().splitlines()) if file.exists() else 0

def interrupted(at, after, *argv):
    "Run one until a number of batches are logged, and interrupt it; how many it made"
    p = Process(*argv)
    while p.p.poll() is None and lines(at/'metrics.jsonl') < after: time.sleep(.2)
    p.p.send_signal(signal.SIGINT)
    check(p.end(1e5), 130, *argv)
    return lines(at/'metrics.jsonl')

def drawn_by_diffusers(lora, prompts, method):
    "Pixels; the last steps are the base's where the method hands over"
    at = switch_step(getattr(method, 'ft_fraction', 1.), S)
    more = dict(callback_on_step_end=switch_off(at)) if lora and at < S else {}
    return plain(weights('shapes-sdxl'), lora, prompts, S, 1., **more)

def measure(name, method, steps, at):
    "One method, in an empty folder"
    shutil.rmtree(at, ignore_errors=True)
    began = time.time()
    own = ['train', name, '--model', 'shapes', '--reward', 'clip', '--heldout', 0, '--steps', steps]
    done(*own, '--out', at/'whole')
    made = interrupted(at/'half', max(1, steps//3), *own, '--out', at/'half')
    done('train', name, '--resume', at/'half')
    same = digest(at/'whole'/lora_file) == digest(at/'half'/lora_file)
    done('sample', '--lora', at/'whole', '--n', PICTURES, '--S', S, '--eta', 0, '--out', at/'pictures')
    told = [json.loads(l) for l in (at/'pictures'/'prompts.jsonl').read_text().splitlines()]
    drawn = torch.stack([read_picture(at/'pictures'/o['file']) for o in told])
    def far(lora):
        other = drawn_by_diffusers(lora, [o['prompt'] for o in told], method)
        return round((other - drawn).abs().max().item()*255, 3)
    return dict(same_bits=same, interrupted_after=made, gap=far(at/'whole'/lora_file), gap_of_base=far(None),
                seconds=round(time.time() - began, 1))

def main():
    a, arms = asked(__doc__, steps=(20, 'batches of each training'))
    torch.set_num_threads(1)
    quiet()
    found, folder = {}, Path('runs/every')
    from diffusion_sharpening.methods.catalog import find
    for name in dict.fromkeys(name for name, _ in arms.values()):       # presets have the same code
        file = folder/f'{name}.json'
        if not file.exists():
            told = measure(name, find(name)(), a.steps, folder/name)
            write_json(file, told | dict(git_commit=origin()['git_commit']))
        found[name] = read_json(file)
        print(name, found[name], flush=True)
    bad = [k for k, o in found.items() if not o['same_bits'] or o['gap'] >= CLOSE]
    if not a.dry: write('every_method', dict(steps=a.steps, pictures=PICTURES, arms=found))
    if bad: raise SystemExit(f"not as it should be: {', '.join(bad)}")

if __name__ == '__main__': main()
