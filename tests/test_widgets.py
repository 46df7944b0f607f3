"Widgets without a browser: what a person decides is what a training reads, and no answer is lost"
import json
import pytest
import torch
from diffusion_sharpening.basics.pictures import as_png
from diffusion_sharpening.commands.train import train
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.widgets.curation import Curation
from diffusion_sharpening.widgets.explorer import BRANCHES, explore, winners
from diffusion_sharpening.widgets.study import Study, sampled, save_choices, tally
from diffusion_sharpening.widgets.views import CurationView, ExplorerView, StudyView
from shared import PROMPTS, Bright, go

def test_answers_train_d3po(made, tmp_path):
    "A study of seeds, answered, is what `d3po` with its human preset learns from"
    study = Study([(p, 2*i, 2*i + 1) for i, p in enumerate(PROMPTS)], tmp_path/'answers.jsonl')
    for side in ('left', 'right', 'tie', 'left'): study.answer(side)
    assert save_choices(study, tmp_path/'choices.jsonl') == 3
    go(made, 'd3po', tmp_path/'run', 1, preset='human', images=str(tmp_path/'choices.jsonl'))
    assert json.loads((tmp_path/'run'/'report.json').read_text())['steps'] == 1

def test_other_samples_than_the_judged_are_refused(made, tmp_path):
    "The seeds of a study that was drawn with two steps are those of other pictures with three"
    model = Denoiser.from_pretrained(made/'xl', device='cpu')
    for S in (2, 3):
        look, study = sampled(model, S), Study([(p, 1, 2) for p in PROMPTS[:2]], tmp_path/f'{S}.jsonl')
        for k in range(2): study.answer('left', [look(PROMPTS[k], o) for o in study.sides(k)])
        assert save_choices(study, tmp_path/f'choices-{S}.jsonl') == 2
    def train_on(S):
        images = str(tmp_path/f'choices-{S}.jsonl')
        return go(made, 'd3po', tmp_path/f'run-{S}', 1, preset='human', images=images)
    with pytest.raises(ValueError, match='expected the pictures that were judged; with S=3'): train_on(2)
    assert train_on(3)['batches'] == 1

def test_accepted_samples_train(made, tmp_path):
    "A curated folder is what `standard --images` learns from"
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mine = Curation(PROMPTS, pictures, tmp_path/'accepted')
    for i in (0, 2, 3): mine.mark(i, True)
    mine.mark(3, False)
    train('standard', model=str(made/'xl'), images=str(tmp_path/'accepted'), out=str(tmp_path/'run'), steps=1,
          reward=f'{made}/mine.py:bright', prompts=str(made/'prompts.txt'), heldout=0, batch=2, rank=2)
    assert json.loads((tmp_path/'run'/'report.json').read_text())['steps'] == 1

def test_the_judged_sample_is_the_one_learned_from(made):
    "The picture of a seed is the picture of the same sample among others"
    model = Denoiser.from_pretrained(made/'xl', guidance=1., device='cpu')
    look = sampled(model, S=3)
    assert look(PROMPTS[0], 5) == look(PROMPTS[0], 5) != look(PROMPTS[0], 6)

@pytest.mark.parametrize('text', ['nonsense\n', '{}\n', '{"answer": "left"}\n', '[1]\n', '\n'])
def test_a_spoiled_file_of_answers_is_named(tmp_path, text):
    "One line with file and line; the file stays as it was"
    path = tmp_path/'answers.jsonl'
    study = Study([('a', 1, 2)]*3, path)
    study.answer('left')
    path.write_text(path.read_text() + text)
    before = path.read_text()
    with pytest.raises(ValueError, match='line 2: expected an answer of a study'):
        Study([('a', 1, 2)]*3, path)
    assert path.read_text() == before

@pytest.mark.parametrize('end', '\x85\u2028\u2029')
def test_a_prompt_may_hold_other_ends_of_lines(tmp_path, end):
    "Characters that are no line feed do not end a line of the answers"
    pairs = [(f'a cat,{end}a dog', 1, 2)]*3
    Study(pairs, tmp_path/'answers.jsonl').answer('left')
    again = Study(pairs, tmp_path/'answers.jsonl')
    assert again.at == 1 and save_choices(again, tmp_path/'choices.jsonl') == 1

def test_answers_under_other_names_are_of_another_study(tmp_path):
    "Or all answers would count for nobody"
    pairs = [('a', 1, 2)]*3
    Study(pairs, tmp_path/'answers.jsonl', names=('before', 'after')).answer('left')
    Study(pairs, tmp_path/'answers.jsonl', names=('before', 'after'))
    with pytest.raises(ValueError, match='line 1: expected an answer of this study'):
        Study(pairs, tmp_path/'answers.jsonl', names=('base', 'mine'))

def test_sides_say_nothing(tmp_path):
    "Over many pairs each side is on the left about as often, and who always presses ← prefers nobody"
    study = Study([('a', 1, 2)]*400, tmp_path/'answers.jsonl', names=('old', 'new'))
    study.answers = [dict(better=study.names[study.swapped(i)]) for i in range(400)]
    win = tally(study)['win']
    assert win['low'] < .5 < win['high']

def test_foreign_files_stay(tmp_path):
    "Only what the curation wrote is removed"
    (tmp_path/'accepted').mkdir()
    other = tmp_path/'accepted'/'mine.png'
    other.write_bytes(b'not yours')
    mine = Curation(['a "quoted"\nprompt'], torch.zeros(1, 3, 8, 8), tmp_path/'accepted')
    mine.mark(0, True)
    mine.mark(0, False)
    assert [p.name for p in (tmp_path/'accepted').iterdir()] == ['mine.png']

@pytest.mark.parametrize('text, why', [
    ('[1]', 'marks of these prompts'), ('{}', 'marks of these prompts'),
    ('{"prompts": ["b"], "marks": [true]}', 'marks of these prompts'),
    ('{"prompts": ["a"]}', 'a mark and a fingerprint'),
    ('{"prompts": ["a"], "pictures": ["00"], "marks": [7]}', 'a mark and a fingerprint'),
    ('{"prompts": ["a"], "pictures": [], "marks": [true]}', 'a mark and a fingerprint'),
    ('{"prompts": ["a"], "pictures": [7], "marks": [true]}', 'marks of these pictures')])
def test_marks_of_something_else_are_named(tmp_path, text, why):
    (tmp_path/'accepted.json').write_text(text)
    with pytest.raises(ValueError, match=f'accepted.json: expected {why}'):
        Curation(['a'], torch.zeros(1, 3, 8, 8), tmp_path/'accepted')
    assert (tmp_path/'accepted.json').read_text() == text

def random_pictures(seed, n=3, side=32):
    "Pictures of the same prompts, made anew for every seed"
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))

def test_other_pictures_do_not_inherit_marks(tmp_path):
    "The same prompts and folder: marks hold for the pictures that were looked at, up to rounding"
    seen = random_pictures(0)
    Curation(PROMPTS[:3], seen, tmp_path/'accepted').mark(0, True)
    assert Curation(PROMPTS[:3], (seen + 1/255).clamp(0, 1), tmp_path/'accepted').accepted == [0]
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(ValueError, match='expected marks of these pictures, found those of others'):
        Curation(PROMPTS[:3], random_pictures(1), tmp_path/'accepted')
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before

def test_other_pictures_do_not_inherit_answers(tmp_path):
    "A study of seeds under another model, and one of files that were written anew, are refused"
    def look(model): return lambda prompt, seed: as_png(random_pictures(100*model + seed, 1)[0])
    study = Study([('a', 1, 2)]*3, tmp_path/'answers.jsonl')
    view = StudyView(study, look(0))
    view.press('left')
    assert StudyView(Study(study.pairs, study.path), look(0)).study.at == 1
    with pytest.raises(ValueError, match='line 1: expected the pictures that were judged'):
        StudyView(Study(study.pairs, study.path), look(1))

def test_a_file_that_nobody_accepted_is_neither_replaced_nor_removed(tmp_path):
    "Also where it has the name of a sample"
    folder = tmp_path/'accepted'
    folder.mkdir()
    (folder/'00000.png').write_bytes(b'not yours')
    mine = Curation(['a'], random_pictures(0, 1), folder)
    with pytest.raises(ValueError, match='00000.png'): mine.mark(0, True)
    mine.mark(0, False)
    mine.mark(0, None)
    assert (folder/'00000.png').read_bytes() == b'not yours' and mine.marks == [None]

def test_an_emptied_folder_is_filled_again(tmp_path):
    "The folder holds what is accepted, also after someone emptied it"
    folder = tmp_path/'accepted'
    mine = Curation(PROMPTS[:3], random_pictures(0), folder)
    for i in (0, 2): mine.mark(i, True)
    for f in folder.iterdir(): f.unlink()
    Curation(PROMPTS[:3], random_pictures(0), folder)
    assert sorted(p.name for p in folder.iterdir()) == ['00000.png', '00000.txt', '00002.png', '00002.txt']

def test_nothing_is_written_before_a_click(tmp_path):
    "To look leaves no folder behind"
    pytest.importorskip('ipywidgets')
    CurationView(Curation(PROMPTS[:3], random_pictures(0), tmp_path/'mine'/'accepted'))
    study = Study([('a', 1, 2)], tmp_path/'mine'/'answers.jsonl')
    def look(prompt, seed): return as_png(random_pictures(seed, 1)[0])
    StudyView(study, look, tmp_path/'mine'/'choices.jsonl')
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize('make', [lambda d: Study([], d/'answers.jsonl'),
                                  lambda d: Curation([], torch.zeros(0, 3, 8, 8), d/'accepted')])
def test_nothing_to_look_at_is_said(tmp_path, make):
    with pytest.raises(ValueError, match='expected at least one'): make(tmp_path)

def test_an_unseen_pair_is_never_answered(tmp_path):
    "A picture that cannot be made is said; what is pressed then counts for nothing"
    pytest.importorskip('ipywidgets')
    def look(prompt, seed):
        if seed == 4: raise FileNotFoundError(2, 'No such file or directory', 'four.png')
        return as_png(random_pictures(seed, 1)[0])
    study = Study([('a', 1, 2), ('b', 3, 4), ('c', 5, 6)], tmp_path/'answers.jsonl')
    view = StudyView(study, look)
    view.press('left')
    assert 'four.png' in view.said.value and all(view.buttons[k].disabled for k in ('left', 'right', 'tie'))
    for key in ('right', 'tie'): view.press(key)
    assert study.at == 1 and not view.buttons['undo'].disabled

def test_an_answer_that_cannot_be_kept_is_said(tmp_path):
    "What is not on disk is not counted"
    pytest.importorskip('ipywidgets')
    study = Study([('a', 1, 2)]*2, tmp_path/'mine'/'answers.jsonl')
    view = StudyView(study, lambda prompt, seed: as_png(random_pictures(seed, 1)[0]))
    (tmp_path/'mine').write_text('a file where a folder should be')
    view.press('left')
    assert study.at == 0 and 'mine' in view.said.value
    (tmp_path/'mine').unlink()
    view.draw()
    view.press('left')
    assert Study(study.pairs, study.path).at == 1

def test_a_study_that_is_done_asks_nothing(tmp_path):
    "Opened again it shows the result and no empty pictures; one answer taken back, it asks"
    pytest.importorskip('ipywidgets')
    study = Study([('a', 1, 2)], tmp_path/'answers.jsonl')
    study.answer('left')
    view = StudyView(Study(study.pairs, study.path), lambda prompt, what: b'')
    assert view.said.value.startswith('All 1 answered. second against first: wins')
    assert view.pair.layout.display == 'none'
    view.press('undo')
    assert view.pair.layout.display is None and 'Which is better' in view.prompt.value
    assert view.buttons['undo'].disabled

@pytest.mark.parametrize('error', [ValueError('too many'), RuntimeError('Overflow'), KeyError('a')])
def test_whatever_the_explorer_meets_is_said(error):
    "Errors in a callback of Jupyter go to a log that nobody sees"
    pytest.importorskip('ipywidgets')
    class Broken:
        def encode(self, prompts): raise error
    view = ExplorerView(Broken(), None, 'a')
    view.run.click()
    assert str(error).strip("'") in view.said.value

def test_every_branch_is_explored(made):
    "Each way to branch, with the last estimates being what the path ends in"
    model = Denoiser.from_pretrained(made/'xl', guidance=1., device='cpu')
    for branch in BRANCHES.values():
        seen = explore(model, Bright(), PROMPTS[0], branch=branch, n=3, S=4, begin=.5)
        assert seen.rewards.shape[1] == 3 and len(seen.times) == len(seen.rewards)
        assert winners(seen)['where it ends'] == int(seen.rewards[-1].argmax())

def test_enter_runs_the_explorer():
    "As the button does; an error is said beside it"
    pytest.importorskip('ipywidgets')
    view = ExplorerView(None, None, ' ')
    view.prompt._handle_string_msg(view.prompt, dict(event='submit'), [])
    assert 'caption: expected a text' in view.said.value

@pytest.mark.parametrize('i, accept', [(-1, True), (3, True), ('0', True), (0, 'yes')])
def test_a_mark_that_is_none_changes_nothing(tmp_path, i, accept):
    mine = Curation(PROMPTS[:3], random_pictures(0), tmp_path/'accepted')
    mine.mark(0, torch.tensor(True))
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(ValueError, match='mark: expected'): mine.mark(i, accept)
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before
    assert Curation(PROMPTS[:3], random_pictures(0), tmp_path/'accepted').marks == [True, None, None]

@pytest.mark.parametrize('names', [('lora', 'lora'), ('base', 'tie'), ('a', 'b', 'c'), ('a',)])
def test_names_of_a_study_tell_who_won(tmp_path, names):
    with pytest.raises(ValueError, match='names: expected two that differ'):
        Study([('a', 1, 2)], tmp_path/'answers.jsonl', names=names)
