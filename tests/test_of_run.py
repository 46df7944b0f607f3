"Weights are sampled, measured and searched with what they were trained with, unless told otherwise"
import json, os, shutil
import pytest, torch
from PIL import Image

from diffusion_sharpening.basics.files import new_mode
from diffusion_sharpening.commands import cli
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.models.lora import lora_file
from diffusion_sharpening.models.tiny import tiny_sdxl
from diffusion_sharpening.training.record import absolute_reward

torch.set_num_threads(1)
FEW = '--steps 1 --S-eval 2 --set batch=2 rank=2'.split()


@pytest.fixture(scope='module')
def at(tmp_path_factory):
    "A folder with a model, a reward, prompts and pictures"
    tmp = tmp_path_factory.mktemp('of_run')
    tiny_sdxl(tmp/'xl', words=['red', 'blue', 'green', 'tree', 'car', 'boat'])
    (tmp/'mine.py').write_text('def redness(images, prompts): return images[:, 0].mean((1, 2))\n')
    (tmp/'prompts.txt').write_text('\n'.join(['red car', 'blue boat', 'green tree', 'red boat']))
    (tmp/'pictures').mkdir()
    for i, text in enumerate(['red car', 'blue boat', 'green tree', 'red boat', 'a tree', 'a car']):
        Image.new('RGB', (64, 64), (40*i, 90, 30)).save(tmp/f'pictures/{i}.png')
        (tmp/f'pictures/{i}.txt').write_text(text)
    return tmp


def go(*line):
    assert cli.run([*map(str, line)]) == 0


def told(capsys, *line):
    capsys.readouterr()
    go(*line, '--json')
    return json.loads(capsys.readouterr().out)


def trained(at, name, method, *more):
    "A run of its own guidance and size"
    go('train', method, '--model', at/'xl', '--reward', f'{at}/mine.py:redness', '--heldout', 2,
       '--guidance', 2, '--px', 32, '--out', at/name, *more, *FEW, *['n=2', 'S=2']*(method == 'rlhf'))
    return at/name, json.loads((at/name/'report.json').read_text())


def test_guidance_size_and_reward_are_those_of_the_run(at, capsys):
    run, rep = trained(at, 'run', 'rlhf', '--prompts', at/'prompts.txt')
    found = told(capsys, 'evaluate', '--lora', run, '--S', 2)
    assert (found['guidance'], found['trained_on'], found['heldout_prompts']) == (2., 0, 2)
    assert found['judges']['mine:redness'] == rep['after']['judges']['mine:redness']
    go('sample', '--lora', run, '--S', 1, '--out', at/'drawn')
    assert Image.open(at/'drawn'/'0000.png').size == (32, 32)
    used = json.loads((at/'drawn'/'sample.json').read_text())['used']
    assert used == dict(eta=0., guidance=2., size=[32, 32])
    line = ['search', 'best_of_n', '--lora', run, '--reward', f'{at}/mine.py:redness', '--n', 1, '--S', 1]
    assert told(capsys, *line, '--budget', 4, '--out', at/'searched')['nfe'] == 4    # two, with guidance
    assert told(capsys, 'evaluate', '--lora', run, '--S', 2, '--guidance', 1)['guidance'] == 1.


def test_pictures_of_ones_own_have_their_captions_held_out(at, capsys):
    run, rep = trained(at, 'pairs', 'standard', '--images', at/'pictures')
    found = told(capsys, 'evaluate', '--lora', run, '--S', 2)
    assert found['prompts'] == rep['heldout_from'] and found['trained_on'] == 0
    assert found['judges']['mine:redness'] == rep['after']['judges']['mine:redness']


def test_prompts_that_have_changed_are_not_called_held_out(at, capsys):
    file = at/'growing.txt'
    file.write_text((at/'prompts.txt').read_text())
    run, _ = trained(at, 'grown', 'rlhf', '--prompts', file)
    file.write_text('\n'.join(f'a car of {k} trees' for k in range(9)) + '\n' + file.read_text())
    with pytest.warns(UserWarning, match='is not what it was when .* was trained'):
        assert told(capsys, 'evaluate', '--lora', run, '--S', 1)['trained_on'] is None


def test_all_weights_of_an_embedded_model_stay_in_its_world(at, capsys):
    go('train', 'rlhf', '--heldout', 2, '--out', at/'full', *FEW[:-1], 'n=2', 'S=2', 'rank=0')
    rep = json.loads((at/'full'/'report.json').read_text())
    found = told(capsys, 'evaluate', '--model', at/'full'/'model', '--n', 2, '--S', 2)
    assert found['guidance'] == 1. and found['nfe_per_image'] == 2 and found['sampler']['eta'] == 1.
    for k in ('clip', 'checker'):
        want = rep['after']['judges'][k]['overall']['mean']
        assert found['judges'][k]['overall']['mean'] == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize('world', ['layouts', 'molecules'])
def test_prompts_of_another_world_are_texts(at, world):
    go('sample', '--prompts', world, '--n', 1, '--S', 1, '--out', at/f'of_{world}')
    assert Image.open(at/f'of_{world}'/'0000.png').size == (64, 64)


@pytest.mark.parametrize('command', ['train', 'plan'])
def test_pictures_are_nothing_for_a_model_of_pages(at, command):
    with pytest.raises(ValueError, match='images: models of layouts make no pictures'):
        cli.run([command, 'standard', '--model', 'layouts', '--images', str(at/'pictures'), '--steps', '1'])


def test_a_run_goes_on_after_model_and_prompts_have_moved(at, capsys):
    "They are named anew; its weights are sampled from there afterwards"
    for name in ('xl', 'prompts.txt'): os.system(f'cp -r {at/name} {at}/first-{name}')
    line = ['train', 'rlhf', '--reward', f'{at}/mine.py:redness', '--heldout', 2, '--out', at/'moved', *FEW]
    line += ['n=2', 'S=2', '--model', at/'first-xl', '--prompts', at/'first-prompts.txt']
    go(*line)
    for name in ('xl', 'prompts.txt'): (at/f'first-{name}').rename(at/f'second-{name}')
    again = ['train', 'rlhf', '--resume', at/'moved', '--steps', 2, '--model', at/'second-xl']
    with pytest.raises(ValueError, match='model was .*/xl.* and is .*/second-xl'):             # it is there
        go('train', 'rlhf', '--resume', at/'run', '--steps', 2, '--model', at/'second-xl')
    go(*again, '--prompts', at/'second-prompts.txt')
    assert 'the end may differ' not in capsys.readouterr().out
    go('sample', '--lora', at/'moved', '--n', 1, '--S', 1, '--out', at/'moved-drawn')
    (at/'second-xl').rename(at/'third-xl')
    go(*again[:5], 3, '--model', at/'third-xl')
    assert json.loads((at/'moved'/'report.json').read_text())['batches'] == 3


def test_a_reward_whose_key_was_held_back_is_asked_for(at):
    run = at/'keyed'
    trained(at, 'keyed', 'rlhf', '--prompts', at/'prompts.txt')
    told = json.loads((run/'run.json').read_text())
    told['reward'] = absolute_reward('remote@http://host/score?key=abc')
    (run/'run.json').write_text(json.dumps(told))
    with pytest.raises(ValueError, match='has not written down all of .*; name it'):
        cli.run(['evaluate', '--lora', str(run), '--S', '1'])
    go('evaluate', '--lora', run, '--S', 1, '--reward', f'{at}/mine.py:redness')


def test_weights_beside_a_saved_pipeline_stay_as_they_are(at):
    mine = at/'saved'/'mine.safetensors'
    mine.parent.mkdir()
    mine.write_bytes(b'not even a head'); mine.chmod(0o600)
    load_model(str(at/'xl')).save_pipeline(at/'saved')
    assert mine.read_bytes() == b'not even a head' and mine.stat().st_mode & 0o777 == 0o600
    assert (at/'saved'/'unet'/'diffusion_pytorch_model.safetensors').stat().st_mode & 0o777 == new_mode()


def refused(monkeypatch, capsys, part, *line):
    "One line that says why, and nothing else"
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: cli.main([*map(str, line)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and part in err and err.count('\n') == 1, err


def test_results_of_a_run_are_not_replaced(at, monkeypatch, capsys):
    "By no other command, and not by the same one for something else"
    no = lambda part, *line: refused(monkeypatch, capsys, part, *line)
    run, _ = trained(at, 'kept', 'rlhf', '--prompts', at/'prompts.txt')
    other, _ = trained(at, 'other', 'rlhf', '--prompts', at/'prompts.txt', '--set', 'seed=1')
    drawn = ['sample', '--lora', run, '--n', 1, '--S', 1, '--out']
    scored = ['score', '--images', at/'pictures', '--prompts', pictured(at), '--reward',
              f'{at}/mine.py:redness', '--out']
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    for line in (['export', other, '--layout', 'diffusers', '--out'], drawn, scored):
        no('holds a finished run', *line, run)
    mine = at/'precious'
    mine.mkdir()
    (mine/'scores.csv').write_text('precious')
    no('this command has not written', *scored, mine)
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file()} == before
    go('export', run)
    assert (run/'lora_kohya.safetensors').is_file()
    go('train', 'rlhf', '--resume', run, '--steps', 2)
    assert not (run/'lora_kohya.safetensors').exists()                     # it was of other weights
    shutil.copyfile(other/lora_file, run/lora_file)
    no('SHA-256 differs', *drawn, at/'odd')


def pictured(at): # A table of pictures and their texts
    file = at/'table.csv'
    file.write_text('file,prompt\n' + ''.join(f'{i}.png,a car\n' for i in range(6)))
    return file


def test_an_early_adapter_says_so(at, capsys):
    run, _ = trained(at, 'early', 'p_graft', '--prompts', at/'prompts.txt', '--set', 'S=4', 'n=2')
    with pytest.warns(UserWarning, match='for the first .* of the steps only'): go('export', run)
    go('push', run, 'me/early', '--dry-run')
    assert 'callback_on_step_end' in capsys.readouterr().out


def test_own_choices_are_measured_on_their_prompts(at):
    "And what is measured is not learned from"
    table = at/'choices.csv'
    table.write_text('prompt,better,worse\n' + ''.join(
        f'{p},pictures/{i}.png,pictures/{i + 1}.png\n'
        for i, p in enumerate(['red car', 'blue boat', 'green tree', 'red boat', 'a tree'])))
    _, rep = trained(at, 'choices', 'diffusion_dpo', '--images', table)
    assert f'split from {table}: 2 held out, 3 to train on' == rep['heldout_from']


def test_json_is_alone_on_stdout(at, capsys):
    (at/'loud.py').write_text("def loud(images, prompts):\n    print('HELLO')\n    return [1.]*6\n")
    found = told(capsys, 'score', '--images', at/'pictures', '--prompts', pictured(at), '--reward',
                 f'{at}/loud.py:loud', '--out', at/'loud')
    assert found['pictures'] == 6
