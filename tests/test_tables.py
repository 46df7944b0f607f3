"Prompts and tables as people write them: encodings, line ends, quotes, hidden files, splits"
import csv, importlib.util, json
from pathlib import Path

import pytest

from diffusion_sharpening.basics.texts import hidden, lines_of, names_in, parsed
from diffusion_sharpening.data.tables import data_files, of_split, prompt_set, table, texts, write_prompts

CASES = Path(__file__).parent/'cases'
needs_pyarrow = pytest.mark.skipif(not importlib.util.find_spec('pyarrow'), reason='pyarrow is not installed')


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(f, *parts):
    "`f` raises a ValueError of one line with all `parts`"
    with pytest.raises(ValueError) as e: f()
    text = str(e.value)
    assert '\n' not in text and len(text) < 600 and all(p in text for p in parts), text


# Encodings

@pytest.mark.parametrize('code', 'utf-8 utf-8-sig utf-16 utf-32'.split())
@pytest.mark.parametrize('name', 'p.txt p.csv p.tsv p.jsonl p.json'.split())
def test_byte_order_marks(tmp_path, code, name):
    "With or without a mark, also in the UTF-16 that spreadsheets write"
    wanted = ['ein grüner Stern', '日本の車', 'a 🐈']
    text = {'p.txt': '\r\n'.join(wanted), 'p.json': json.dumps(wanted),
            'p.jsonl': '\n'.join(json.dumps(dict(prompt=p), ensure_ascii=False) for p in wanted),
            'p.csv': 'id,prompt\n' + ''.join(f'1,{p}\n' for p in wanted),
            'p.tsv': 'prompt\tid\n' + ''.join(f'{p}\t1\n' for p in wanted)}[name]
    assert prompt_set(str(write(tmp_path/name, text.encode(code)))) == wanted


def test_marks_within_a_file(tmp_path):
    "Two files with marks, put together with `cat`"
    both = '\ufeffa cat\n'.encode() + '\ufeffa dog\n'.encode()
    assert prompt_set(str(write(tmp_path/'p.txt', both))) == ['a cat', 'a dog']


OLD = {'p.txt': b'a cat\nit\x92s a dog\n', 'p.csv': b'id,prompt\n1,it\x92s a dog\n',
       'p.jsonl': b'{"prompt": "a"}\n{"prompt": "\xe9"}\n',
       'p.tsv': b'prompt\tid\n\x93word\x94\t1\n', 'p.json': b'[\n"caf\xe9"]',
       'sjis.txt': b'a cat\n\x93\xfa\x96{\n'}


@pytest.mark.parametrize('name', OLD)
def test_other_encodings_are_refused_with_their_line(tmp_path, name):
    f = write(tmp_path/name, OLD[name])
    refused(lambda: prompt_set(str(f)), f'{name}, line 2', 'expected UTF-8 text, found the byte 0x', 'save')


def test_zero_bytes(tmp_path):
    for data, part in (('a cat\n'.encode('utf-16-le'), 'zero bytes'), (b'\xff\xfea', 'UTF-16')):
        refused(lambda: prompt_set(str(write(tmp_path/'p.txt', data))), 'p.txt', part)


# Ends of lines

@pytest.mark.parametrize('odd', ['\u2028', '\u2029', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\x85', '\r'])
@pytest.mark.parametrize('name', 'p.txt p.csv p.tsv p.jsonl'.split())
def test_only_line_feeds_end_lines(tmp_path, odd, name):
    "What `str.splitlines` would cut at"
    wanted = [f'a cat{odd}on a mat', 'a dog']
    text = {'p.txt': '\r\n'.join(wanted), 'p.csv': 'prompt,n\r\n' + ''.join(f'{p},1\r\n' for p in wanted),
            'p.tsv': 'n\tprompt\n' + ''.join(f'1\t{p}\n' for p in wanted),
            'p.jsonl': '\n'.join(json.dumps(dict(prompt=p), ensure_ascii=False) for p in wanted)}[name]
    f = write(tmp_path/name, text)
    if (odd, name) == ('\r', 'p.csv'): return refused(lambda: prompt_set(str(f)), 'row 1')  # to be quoted
    assert prompt_set(str(f)) == wanted


def test_old_macs_end_lines_of_csv_with_carriage_returns(tmp_path):
    assert prompt_set(str(write(tmp_path/'p.csv', 'id,prompt\r1,a cat\r2,a dog\r'))) == ['a cat', 'a dog']


# Separators and quotes

GOOD = {
    'semicolons': ('p.csv', 'id;prompt\n1;a red, big cat\n2;"a; b"\n', ['a red, big cat', 'a; b']),
    'semicolons and commas in the header': ('p.csv', 'prompt;"size, cm"\na cat;3\n', ['a cat']),
    'tabs in csv': ('p.csv', 'id\tprompt\n1\ta red, big cat\n', ['a red, big cat']),
    'told by Excel': ('p.csv', 'sep=;\nprompt;id\n"a;b";1\n', ['a;b']),
    'one column of commas': ('p.csv', 'prompt\na red, big cat\na dog\n', ['a red, big cat', 'a dog']),
    'one column, semicolons': ('p.csv', 'caption\na; b\nc, d; e\n', ['a; b', 'c, d; e']),
    'unquoted at the end': ('p.csv', 'file,prompt\n0.jpg,a red, big cat\n1.jpg,"a, dog"\n',
                            ['a red, big cat', 'a, dog']),
    'unquoted in the middle': ('p.csv', 'file,prompt,seed\n0.jpg,a red, big, cat,7\n', ['a red, big, cat']),
    'unquoted at the start': ('p.csv', 'caption,file_name\nred, big,0.jpg\n', ['red, big']),
    'unquoted semicolon': ('p.csv', 'id;text\n1;a cat; a dog\n', ['a cat; a dog']),
    'space before a quote': ('p.csv', 'id,prompt\n1, "a, b"\n', ['a, b']),
    'quotes within': ('p.csv', 'prompt,id\n6" ruler,1\n"say ""hi""",2\n', ['6" ruler', 'say "hi"']),
    'two lines': ('p.csv', 'prompt,id\n"a cat\non a mat",1\n', ['a cat\non a mat']),
    'blank lines': ('p.csv', '\nprompt,id\n\na cat,1\n\n', ['a cat']),
    'spaces in the header': ('p.csv', ' id , Prompt \n1,a cat\n', ['a cat']),
    'quoted header': ('p.csv', '"id";"prompt"\n1;a, b\n', ['a, b']),
    'PartiPrompts': ('p.tsv', 'Prompt\tCategory\n6" ruler\ttext\n"open\tx\nthe word "GO"\ty\n',
                     ['6" ruler', '"open', 'the word "GO"']),
    'two open quotes': ('p.tsv', 'Prompt\tCategory\n"open\tx\nnext\ty\n"shut\tz\n',
                        ['"open', 'next', '"shut']),
    'a quote that would swallow rows': ('p.tsv', 'Prompt\tCategory\n"a\tx\nb"\ty\n', ['"a', 'b"']),
    'tsv of Excel': ('p.tsv', 'id\tprompt\r\n1\t"say ""hi"""\r\n2\t"a, b"\r\n', ['say "hi"', 'a, b']),
    'tsv of two lines': ('p.tsv', 'id\tprompt\n1\t"a cat\non a mat"\n2\ta dog\n',
                         ['a cat\non a mat', 'a dog']),
    'tsv of one column': ('p.tsv', 'prompt\n"open\nnext\nthe "word"\n', ['"open', 'next', 'the "word"']),
    'tsv of one column, two lines': ('p.tsv', 'prompt\n"a cat\non a mat"\na dog\n',
                                     ['a cat\non a mat', 'a dog']),
    'empty cells': ('p.tsv', 'prompt\tnote\na cat\t\na dog\tx\n', ['a cat', 'a dog'])}


@pytest.mark.parametrize('name', GOOD)
def test_tables_are_read_as_meant(tmp_path, name):
    file, content, wanted = GOOD[name]
    assert prompt_set(str(write(tmp_path/file, content))) == wanted


@pytest.mark.parametrize('name', ['p.csv', 'p.tsv', 'p.jsonl', 'p.txt'])
def test_huge_cells(tmp_path, name):
    "More than the 131,072 characters that Python's csv takes by default"
    long = 'a cat ' + 'x'*300_000
    text = {'p.txt': long, 'p.jsonl': json.dumps(dict(prompt=long)), 'p.tsv': f'prompt\tid\n{long}\t1',
            'p.csv': f'id,prompt\n1,"{long}"'}[name]
    assert prompt_set(str(write(tmp_path/name, text))) == [long]


BAD = {
    'ambiguous comma': ('p.csv', 'kind,prompt\nold, grey,a cat\n',
                        ['row 1', 'expected 2 fields', 'found 3', 'quote']),
    'ambiguous for quotes': ('p.csv', 'id,prompt\n1,"a cat", big\n', ['row 1', 'found 3']),
    'two texts': ('p.csv', 'prompt,caption\na,b,c\n', ['row 1', 'found 3']),
    'never closed': ('p.csv', 'id,prompt\n1,a\n2,"a dog\n3,b\n',
                     ['row 2 (line 3)', 'a quote that is never closed']),
    'closed by another row': ('p.csv', 'id,prompt\n1,"a dog\n2,"a fox"\n',
                              ['row 1 (line 2)', 'expected whole cells']),
    'short row': ('p.csv', 'id,prompt,x\n1,a,2\n2,b\n', ['row 2', 'expected 3 fields', 'found 2']),
    'short row of tabs': ('p.tsv', 'prompt\tid\na\t1\nb\n', ['row 2', 'expected 2 fields', 'found 1']),
    'a column twice': ('p.csv', 'text,text\na,b\n', ["found 'text' twice"]),
    'a key twice': ('p.jsonl', '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n',
                    ['line 2', "'prompt' twice"]),
    'no header': ('p.csv', 'a red cat\na blue dog\n', ['prompt, caption, text', 'found a red cat']),
    'no header in tabs': ('p.tsv', 'a red cat\na blue dog\n', ['prompt, caption, text', 'found a red cat']),
    'half of a pair': ('p.jsonl', '{"prompt": "a"}\n{"prompt": "b \\ud83d"}\n',
                       ['row 2', 'half of a character', 'ud83d']),
    'half of a pair, in a list': ('p.json', '["\\udc00"]', ['row 1', 'half of a character']),
    'deep': ('p.json', '['*100_000, ['p.json', 'expected JSON']),
    'long number': ('p.jsonl', '{"prompt": "a", "n": ' + '1'*5000 + '}', ['line 1', 'expected JSON']),
    'list of texts': ('p.jsonl', '{"prompt": ["a", "b"]}', ['row 1', "found ['a', 'b']"])}


@pytest.mark.parametrize('name', BAD)
def test_what_is_unclear_is_refused_with_its_row(tmp_path, name):
    file, content, parts = BAD[name]
    refused(lambda: prompt_set(str(write(tmp_path/file, content))), file, *parts)


def test_the_cases_that_were_filed():
    assert prompt_set(f'{CASES}/dollar-prompt.txt') == ['a face with $_$ eyes', 'a dog']
    assert prompt_set(f'{CASES}/prompt-of-two-lines.jsonl') == ['a cat\non a mat', 'a dog']
    assert prompt_set(f'{CASES}/quoted-word.tsv') == ['6" ruler', '"open', 'next']
    f = f'{CASES}/unquoted-comma.csv'
    refused(lambda: prompt_set(f), 'unquoted-comma.csv, row 2 (line 3)', 'never closed')


@needs_pyarrow
def test_columns_of_parquet(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    odd = ['a cat\non a mat', 'a\u2028b', 'x'*200_000]
    pq.write_table(pa.table({'Caption': odd, 'n': [1, 2, 3]}), tmp_path/'p.parquet')
    assert prompt_set(f'{tmp_path}/p.parquet') == odd
    pq.write_table(pa.table({'prompt': ['a', None]}), tmp_path/'p.parquet')
    refused(lambda: prompt_set(f'{tmp_path}/p.parquet'), 'row 2', 'found None')


# There and back

ODD = ['a cat\non a mat', 'a\r\nb', 'a\u2028b\x0cc\x0bd\x85e', 'a red, big; cat\t!', '"quoted"',
       "it's 6\" $_$", '{"prompt": 1}', '[1]', '7', 'null', '=1+1', '#hash', '\\n',
       'ünïcödé 日本 🐈', 'x'*200_000, 'sep=;']


def test_what_is_written_is_read_back(tmp_path):
    f = write_prompts(tmp_path/'prompts.jsonl', ODD)
    assert prompt_set(str(f)) == ODD
    assert prompt_set(str(write_prompts(f, ODD, [f'{i}.png' for i in range(len(ODD))]))) == ODD
    assert [p.name for p in tmp_path.iterdir()] == ['prompts.jsonl']      # nothing left beside it
    with pytest.raises(ValueError): write_prompts(f, ODD, ['one.png'])
    assert prompt_set(str(f)) == ODD                                      # and the old one is whole


def test_csv_of_other_programs_is_read_back(tmp_path):
    "As Python's csv and spreadsheets write it"
    for mark in ',;\t':
        for rule in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
            with open(tmp_path/'p.csv', 'w', newline='', encoding='utf-8') as f:
                csv.writer(f, delimiter=mark, quoting=rule).writerows([['id', 'prompt'], *enumerate(ODD)])
            assert texts(table(tmp_path/'p.csv')) == ODD


# Hidden files and splits

@pytest.mark.parametrize('name', ['._p.txt', '.p.txt', '.git/p.txt', '.ipynb_checkpoints/p-checkpoint.txt',
                                  '__MACOSX/p.txt', 'sub/__MACOSX/._p.txt', 'Thumbs.db', 'sub/desktop.ini',
                                  '@eaDir/p.txt'])
def test_hidden_files_are_never_data(tmp_path, name):
    write(tmp_path/'d/p.txt', 'a cat\n'); write(tmp_path/'d'/name, b'\xff\x00 not text')
    assert hidden(name) and names_in(tmp_path/'d') == ['p.txt'] and prompt_set(f'{tmp_path}/d') == ['a cat']


def test_a_hidden_place_may_be_named(tmp_path):
    "Only what lies hidden within the folder that was named is left out"
    write(tmp_path/'.cache/set/p.txt', 'a cat\n'); write(tmp_path/'.mine.txt', 'a dog\n')
    assert prompt_set(f'{tmp_path}/.cache/set') == ['a cat']
    assert prompt_set(f'{tmp_path}/.mine.txt') == ['a dog']


def test_links(tmp_path):
    "Folders behind links count once, and circles end"
    write(tmp_path/'far/p.txt', 'a cat\n'); (tmp_path/'d').mkdir()
    (tmp_path/'d/near').symlink_to(tmp_path/'far', target_is_directory=True)
    (tmp_path/'far/round').symlink_to(tmp_path/'d', target_is_directory=True)
    assert names_in(tmp_path/'d') == ['near/p.txt']


SPLITS = [
    (['crash test.txt', 'red bus.txt'], '', ['crash test.txt', 'red bus.txt']),
    (['val thorens.txt', 'train station.txt'], '', ['val thorens.txt', 'train station.txt']),
    (['train.txt', 'test.txt'], '', ['train.txt']), (['a.txt', 'test.txt'], '', ['a.txt']),
    (['train/a.txt', 'test/a.txt'], '', ['train/a.txt']),
    (['data/train-0-of-2.txt', 'data/validation-0-of-1.txt'], '', ['data/train-0-of-2.txt']),
    (['cats_test.txt', 'cats_train.txt'], '', ['cats_train.txt']),
    (['cats_test.txt', 'cats_train.txt'], 'test', ['cats_test.txt']),
    (['red test.txt', 'b.txt'], 'test', ['red test.txt']),
    (['trainer.txt', 'x/val.txt'], 'validation', ['x/val.txt']),
    (['latest.txt', 'contest.txt'], '', ['latest.txt', 'contest.txt']),
    (['mine/a.txt', 'b.txt'], 'mine', ['mine/a.txt'])]


@pytest.mark.parametrize('names, split, wanted', SPLITS)
def test_splits(names, split, wanted):
    assert of_split(names, split) == wanted and data_files(names, split) == sorted(wanted)


def test_lines_and_json_stand_alone(tmp_path):
    assert list(lines_of(write(tmp_path/'a', b'x\r\n\r\ny'))) == ['x', '', 'y']
    assert parsed('a', '{"a": {"b": 1}}') == dict(a=dict(b=1))
    refused(lambda: parsed('a.json', '{"a": {"b": 1, "b": 2}}'), 'a.json', "'b' twice")
