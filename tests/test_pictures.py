"Pictures as they come: broken ones named before training, odd headers, hidden files, tables of pictures"
import base64, csv, importlib.util, io, json, shutil, struct, tarfile, warnings, zlib
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from diffusion_sharpening.basics.pictures import (
    LITERAL, as_png, marked, open_header, open_picture, plain, read_picture, write_grid)
from diffusion_sharpening.data.pictures import image_pairs

CASES = Path(__file__).parent/'cases'
needs_pyarrow = pytest.mark.skipif(not importlib.util.find_spec('pyarrow'), reason='pyarrow is not installed')
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def file_of(im, kind='PNG', **kw): im.save(f := io.BytesIO(), kind, **kw); return f.getvalue()
def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(f, *parts):
    with pytest.raises(ValueError) as e: f()
    assert '\n' not in str(e.value) and all(p in str(e.value) for p in parts), str(e.value)
    return str(e.value)


PNG, JPG = file_of(NOISE), file_of(NOISE, 'JPEG')


def pairs(d, files, size=32, **kw):
    "A folder of pictures, each with a caption beside it"
    for name, data in files.items():
        write(d/name, data); write((d/name).with_suffix('.txt'), f'it is {name}')
    return image_pairs(str(d), size, **kw)


# Looked at before training

def moving(kind): return file_of(NOISE, kind, save_all=True, append_images=[NOISE.rotate(90)])


def header(width, height, kind):  # A PNG whose header promises more than its data hold
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    ihdr = struct.pack('>IIBBBBB', width, height, 8, kind, 0, 0, 0)
    parts = chunk(b'IHDR', ihdr), chunk(b'IDAT', zlib.compress(b'\0'*64)), chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


BROKEN = {
    'cut.jpg': (JPG[:-500], 'truncated'), 'cut.png': (PNG[:-500], 'truncated'),
    'half.jpg': (JPG[:len(JPG)//2], 'truncated'),
    'one byte short.jpg': (JPG[:-1], 'truncated'), 'cut.webp': (file_of(NOISE, 'WEBP')[:-300], ''),
    'cut.bmp': (file_of(NOISE, 'BMP')[:-99], 'truncated'), 'cut.tif': (file_of(NOISE, 'TIFF')[:-99], ''),
    'flipped.png': (PNG[:300] + bytes([PNG[300] ^ 255]) + PNG[301:], ''), 'empty.png': (b'', 'an empty file'),
    'text.jpg': (b'<html>not found</html>', 'no picture that can be read'),
    'deep.png': (file_of(Image.new('I;16', (8, 8))), '8 bits'),
    'deep.tif': (file_of(Image.new('F', (8, 8)), 'TIFF'), '8 bits'), 'moving.gif': (moving('GIF'), 'several'),
    'moving.webp': (moving('WEBP'), 'several'), 'moving.png': (moving('PNG'), 'several'),
    'pages.tif': (moving('TIFF'), 'several'),
    'nothing.png': (header(0, 8, 2), ''), 'bomb.png': (header(30_000, 30_000, 0), 'pixels'),
    'big.png': (header(9_500, 9_500, 0), 'pixels'), 'promise.png': (header(4_000, 4_000, 2), ''),
    'program.jpg': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n', 'no picture that')}


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('name', BROKEN)
def test_each_broken_picture_is_named(tmp_path, name):
    data, part = BROKEN[name]
    ps = pairs(tmp_path/'d', {'good.png': PNG, name: data, 'also good.jpg': JPG})
    said = refused(ps.check, '1 of 3 cannot be used', f'{tmp_path}/d/{name} (', part)
    assert 'good' not in said
    refused(lambda: open_picture(data, name), f'whole picture in {name}, found ')


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_all_broken_pictures_are_named_at_once(tmp_path):
    "The first ten and how many there are"
    files = {k: v[0] for k, v in BROKEN.items()}
    said = refused(pairs(tmp_path/'d', files | {'good.png': PNG}).check, f'{len(files)} of {len(files)+1}')
    assert said.count(f'{tmp_path}') == 10 and f'and {len(files) - 10} more' in said
    few = dict([*files.items()][:4])
    assert refused(pairs(tmp_path/'few', few).check).count('few/') == 4


def test_whole_pictures_pass(tmp_path):
    "Every kind, also those that look odd"
    files = {'a.png': PNG, 'b.JPG': JPG, 'c.jfif': JPG, 'd.jpe': JPG,
             'e.webp': file_of(NOISE, 'WEBP'), 'f.bmp': file_of(NOISE, 'BMP'),
             'g.gif': file_of(NOISE, 'GIF'), 'h.tiff': file_of(NOISE, 'TIFF'),
             'i.jpeg': file_of(NOISE, 'JPEG', progressive=True),
             'j.png': file_of(NOISE.convert('P')), 'k.png': file_of(NOISE.convert('LA')),
             'l.tif': file_of(NOISE.convert('CMYK'), 'TIFF'),
             'm.jpg': file_of(NOISE, 'MPO', save_all=True, append_images=[NOISE.resize((8, 8))]),
             'n.jpg': PNG}
    ps = pairs(tmp_path/'d', files)
    assert ps.check() is None and len(ps) == len(files)
    assert all(ps[i][0].shape == (3, 32, 32) for i in range(len(ps)))


def test_the_truncated_case_that_was_filed(tmp_path):
    ps = image_pairs(f'{CASES}/truncated-picture', 32)
    refused(ps.check, '1 of 6', '4.jpg (image file is truncated')


def test_training_does_not_begin_on_broken_pictures(tmp_path, monkeypatch):
    "The command, with the embedded model: nothing is trained, nothing is written"
    from diffusion_sharpening.commands.cli import run
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CASES/'truncated-picture', tmp_path/'set')
    write(tmp_path/'set/5.jpg', b'')
    refused(lambda: run(['train', 'sft', '--images', 'set', '--out', 'run', '--steps', '1', '--heldout', '0',
                         '--preset', 'plain']), '2 of 6 cannot be used', '4.jpg (', '5.jpg (an empty file)')
    assert not (tmp_path/'run').exists()


# Limits from the header

def test_limits_come_before_decoding():
    big = file_of(Image.new('1', (3000, 3000)))
    assert len(big) < 3000 and open_header(big).size == (3000, 3000)
    for f in (open_header, open_picture, read_picture):
        refused(lambda: f(big, 'images[1]', limit=10**6), 'images[1]',
                '3000 × 3000 pixels, more than 1,000,000')
        assert f(big, limit=9*10**6) is not None


# Orientation

def held(kind, count, value):  # A JPEG whose EXIF tag 0x112 has this type and value
    tag = struct.pack('>HHHI', 1, 0x112, kind, count) + value.ljust(4, b'\0') + bytes(4)
    return file_of(NOISE, 'JPEG', exif=b'Exif\0\0MM\0*' + struct.pack('>I', 8) + tag)


ODD = {'text': (2, 2, b'6\0'), 'byte': (1, 1, b'\6'), 'list': (3, 2, b'\0\1\0\6'),
       'nowhere': (5, 1, b'\xff\0\0\0'),
       'zero': (3, 1, b'\0\0'), 'nine': (3, 1, b'\0\t'), 'huge': (3, 1, b'\xff\xff'),
       'unknown type': (99, 1, b'\6'),
       'signed': (8, 1, b'\xff\xff'),
       'real': (11, 1, struct.pack('>f', 6.5)), 'many': (3, 60_000, b'\0\0\0\1')}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ODD)
def test_odd_orientations_are_upright(tmp_path, name):
    ps = pairs(tmp_path/'d', {'a.jpg': held(*ODD[name])}, size=64, buckets=True, step=8)
    assert ps.check() is None and open_picture(held(*ODD[name])).size == (64, 48)
    assert ps[0][0].shape[1:] == ps.shape(0) == (56, 72) and ps[0][2][:2] == (48, 64)


@pytest.mark.parametrize('k', range(1, 9))
def test_every_orientation_is_undone(tmp_path, k):
    "As Pillow's own transposition does it, and with the same shape from the header"
    from PIL import ImageOps
    data = held(3, 1, struct.pack('>H', k))
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB')
    assert open_picture(data).tobytes() == want.tobytes()
    exif = Image.Exif(); exif[0x112] = k
    for kind in ('PNG', 'WEBP', 'TIFF'):
        assert open_picture(file_of(NOISE, kind, exif=exif)).size == want.size
    fresh = pairs(tmp_path/'d', {'a.png': file_of(NOISE, exif=exif)}, size=64, buckets=True, step=8)
    assert fresh.shape(0) == fresh[0][0].shape[1:]


@pytest.mark.filterwarnings('ignore')
def test_damaged_exif():
    start = b'Exif\0\0'
    for junk in (b'', start, start + b'MM\0*\0\0\xff\xff', start + b'II*\0\x08\0\0\0\xff\xff', b'junk'*99):
        assert open_picture(file_of(NOISE, 'JPEG', exif=junk)).size == (64, 48)


# Folders

@pytest.mark.parametrize('case, n', [('hidden/pairs', 2), ('hidden/mac', 1), ('name-says-test', 3)])
def test_the_folders_that_were_filed(case, n):
    left = image_pairs(f'{CASES}/{case}', 32)
    assert len(left) == n and left.check() is None and not any('/.' in str(p) for p in left.parts[0].paths)


@pytest.mark.parametrize('name', ['crash test.png', 'val thorens.png', 'train station.png', 'test.png',
                                  'eval-1.png', 'my_test_2.png', 'dev.png'])
def test_a_name_is_no_split(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ps = pairs(tmp_path/'d', {name: PNG, 'bus.png': PNG, 'train.png': PNG})
    assert sorted(ps.captions) == sorted({f'it is {n}' for n in (name, 'bus.png', 'train.png')})


def test_splits_are_folders_and_asked_for(tmp_path):
    with pytest.warns(UserWarning, match='holds train and test, and all are read; name one as in .*@train'):
        all_of = pairs(tmp_path/'d', {'train/a test.png': PNG, 'test/b train.png': PNG, 'test/c.png': PNG})
    assert len(all_of) == 3
    assert image_pairs(f'{tmp_path}/d@train', 32).captions == ['it is train/a test.png']
    assert len(image_pairs(f'{tmp_path}/d@test', 32)) == 2
    refused(lambda: image_pairs(f'{tmp_path}/d@validation', 32), "a folder of the split 'validation'")


@pytest.mark.parametrize('name', ['._a.png', '.ipynb_checkpoints/a.png', '__MACOSX/a.png', '__MACOSX/._a.png',
                                  '.git/a.png', '.a.png', '@eaDir/a.png'])
def test_hidden_pictures_are_never_data(tmp_path, name):
    "In folders, in archives, beside tables, with captions or without"
    d = tmp_path/'d'
    pairs(d, {'a.png': PNG}); write(d/name, b'\0\xff junk'); write((d/name).with_suffix('.txt'), b'\xff\0')
    assert image_pairs(str(d), 32).captions == ['it is a.png']
    with tarfile.open(tmp_path/'s.tar', 'w') as t:
        for f in ('a.png', 'a.txt', name, str(Path(name).with_suffix('.txt'))): t.add(d/f, f'set/{f}')
    assert image_pairs(f'{tmp_path}/s.tar', 32).captions == ['it is a.png']
    write(d/'metadata.csv', 'file_name,text\na.png,it is a.png\n'); write(d/'._metadata.csv', b'\xff\0junk')
    assert image_pairs(str(d), 32).captions == ['it is a.png']


def test_captions_in_other_encodings(tmp_path):
    refused(lambda: image_pairs(f'{CASES}/cp1252-caption', 32),
            'cp1252-caption/b.txt, line 1', 'UTF-8', '0x92', "'’'")
    pairs(tmp_path/'d', {'a.png': PNG})
    for code in ('utf-8-sig', 'utf-16'):
        write(tmp_path/'d/a.txt', 'ein grüner Stern\r\n'.encode(code))
        assert image_pairs(f'{tmp_path}/d', 32).captions == ['ein grüner Stern']
    write(tmp_path/'d/metadata.csv', b'file_name,text\na.png,gr\xfcn\n')
    refused(lambda: image_pairs(f'{tmp_path}/d', 32), 'metadata.csv, line 2', '0xfc')


def test_missing_captions_and_unknown_kinds(tmp_path):
    d = tmp_path/'d'
    pairs(d, {f'{i:02}.png': PNG for i in range(15)})
    for i in range(1, 14): (d/f'{i:02}.txt').unlink()
    said = refused(lambda: image_pairs(str(d), 32), 'none for 13 of 15: 01.png, 02.png', 'and 3 more')
    assert said.count('.png') == 10
    (d/'a.TXT').write_text('upper'); write(d/'a.PNG', PNG)
    for i in range(1, 14): (d/f'{i:02}.png').unlink()
    assert image_pairs(str(d), 32).captions == ['it is 00.png', 'it is 14.png', 'upper']
    write(d/'photo.heic', b'x'); write(d/'photo.txt', 'a photo'); write(d/'notes.txt', 'about this set')
    refused(lambda: image_pairs(str(d), 32), 'found photo.heic', '.jfif')


# Told twice

TWICE = {
    'two tables': ({'metadata.csv': 'file_name,text\na.png,one\n',
                    'metadata.jsonl': '{"file_name": "a.png", "text": "one"}'},
                   ['metadata.csv', 'metadata.jsonl']),
    'table and text': ({'metadata.csv': 'file_name,text\na.png,one\n', 'a.txt': 'two'},
                       ['metadata.csv', 'a.txt']),
    'a column twice': ({'metadata.csv': 'file_name,text,text\na.png,one,two\n'}, ["'text' twice"]),
    'a key twice': ({'metadata.jsonl': '{"file_name": "a.png", "text": "one", "text": "two"}'},
                    ["'text' twice"]),
    'tables in two folders': ({'metadata.csv': 'file_name,text\nsub/b.png,one\n',
                               'sub/metadata.csv': 'file_name,text\nb.png,two\n'},
                              ['sub/b.png', 'metadata.csv'])}


@pytest.mark.parametrize('name', TWICE)
def test_what_is_told_twice(tmp_path, name):
    files, parts = TWICE[name]
    write(tmp_path/'a.png', PNG); write(tmp_path/'sub/b.png', PNG)
    for k, v in files.items(): write(tmp_path/k, v)
    refused(lambda: image_pairs(str(tmp_path), 32), *parts)


def test_two_captions_of_a_picture_in_one_table_are_two_pairs(tmp_path):
    write(tmp_path/'a.png', PNG); write(tmp_path/'metadata.csv', 'file_name,text\na.png,one\na.png,two\n')
    assert image_pairs(str(tmp_path), 32).captions == ['one', 'two']


# Pictures within tables

CODE = base64.b64encode(PNG).decode()
CELLS = {'base64': CODE, 'data url': f'data:image/png;base64,{CODE}',
         'url-safe': base64.urlsafe_b64encode(PNG).decode(),
         'unpadded': CODE.rstrip('='), 'folded': '\n'.join(CODE[i:i+76] for i in range(0, len(CODE), 76)),
         'jpeg': base64.b64encode(JPG).decode(), 'dict': dict(bytes=CODE, path='a.png'), 'list': [*PNG]}


@pytest.mark.parametrize('name', CELLS)
def test_base64_columns(tmp_path, name):
    want = JPG if name == 'jpeg' else PNG
    write(tmp_path/'t.jsonl', ''.join(json.dumps(dict(image=CELLS[name], text=t)) + '\n' for t in 'ab'))
    ps = image_pairs(f'{tmp_path}/t.jsonl', 32)
    assert ps.captions == ['a', 'b'] and ps.data(1) == want and ps.check() is None
    if not isinstance(CELLS[name], str): return
    with open(tmp_path/'t.csv', 'w', newline='') as f:
        csv.writer(f).writerows([['image', 'text'], [CELLS[name], 'a']])
    assert image_pairs(f'{tmp_path}/t.csv', 32).data(0) == want


@needs_pyarrow
@pytest.mark.parametrize('cell', [PNG, CODE, dict(bytes=PNG, path=None), dict(bytes=PNG, path='x'), [*PNG]])
def test_columns_of_parquet(tmp_path, cell):
    import pyarrow as pa, pyarrow.parquet as pq
    t = pa.table({'image': [cell]*3, 'text': ['a', 'b', 'c']})
    pq.write_table(t, tmp_path/'t.parquet', row_group_size=2)
    ps = image_pairs(f'{tmp_path}/t.parquet', 32)
    assert ps.captions == ['a', 'b', 'c'] and [ps.data(i) for i in range(3)] == [PNG]*3 and ps.check() is None


ROWS = {
    'address': ('https://a.org/b.png', ['row 1', 'an address: download it first']),
    'long name': ('x'*5000, ['row 1', 'found no file']),
    'odd base64': (CODE[:99] + '*' + CODE[99:], ['row 1', 'base64']),
    'no name': (' ', ['row 1', "a text in 'image'"]), 'nothing': (None, ['row 1', 'found None']),
    'number': (7, ['row 1', 'found 7']),
    'zero byte': ('a\0.png', ['row 1', 'found no file']), 'empty dict': ({}, ['row 1'])}


@pytest.mark.parametrize('name', ROWS)
def test_bad_cells_are_one_line(tmp_path, name):
    cell, parts = ROWS[name]
    f = write(tmp_path/'t.jsonl', json.dumps(dict(image=cell, text='a')) + '\n')
    refused(lambda: image_pairs(str(f), 32), *parts)


def test_cut_base64_is_found_beforehand(tmp_path):
    f = write(tmp_path/'t.jsonl', json.dumps(dict(image=CODE[:len(CODE)//2], text='a')) + '\n')
    refused(image_pairs(str(f), 32).check, '1 of 1', 't.jsonl, row 1 (')


def test_names_of_windows(tmp_path):
    write(tmp_path/'sub/a.png', PNG); f = write(tmp_path/'t.csv', 'file,text\nsub\\a.png,one\n')
    assert image_pairs(str(f), 32).data(0) == PNG


@pytest.mark.parametrize('size, want', [(32, (32, 32)), ([32, 48], (32, 48)), ((32,), (32, 32)),
                                        (torch.Size([16, 32]), (16, 32)), (np.int64(32), (32, 32)),
                                        ([np.int64(16), 32], (16, 32))])
def test_sizes_as_configs_have_them(tmp_path, size, want):
    assert pairs(tmp_path/'d', {'a.png': PNG}, size)[0][0].shape == (3, *want)


# Written and drawn

def test_nan_pictures_are_not_black(tmp_path):
    x = torch.rand(3, 3, 16, 16); x[1, 2, 5, 5] = float('nan'); x[2, 0, 0, 0] = float('inf')
    for i in (1, 2): refused(lambda: as_png(x[i], f'{i:04}.png'), f'finite numbers in {i:04}.png')
    assert marked(x[:1]) is x[:1] or torch.equal(marked(x[:1]), x[:1])
    write_grid(x, tmp_path/'grid.png')
    seen = read_picture(tmp_path/'grid.png')
    for i in (1, 2):
        tile = seen[:, 2:18, 20*i + 2:20*i + 18]
        assert tile[:, 0, 0].tolist() == [1, 0, 0] and tile[:, 0, 8].tolist() == [1, 1, 1]
    assert torch.allclose(seen[:, 2:18, 2:18], x[0], atol=.003)


NASTY = ['a face with $_$ eyes', '$', '$$', '\\frac{', '$\\frac{a}$', '{}^', 'a_b^c', '5$ or 10$', '\ud83d',
         'a\x00b', 'a\u2028b', '#%&~', '日本', '🐈', '$\\alpha$', 'line\nbreak $_$']


@pytest.mark.filterwarnings('ignore:Glyph')
@pytest.mark.parametrize('text', NASTY)
def test_text_of_users_is_drawn_as_it_stands(tmp_path, text):
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.set_title(plain(text), **LITERAL); ax.text(0, 0, plain(text), **LITERAL)
    fig.suptitle(plain(text), **LITERAL)
    fig.savefig(tmp_path/'f.png'); plt.close(fig)
    assert ax.title.get_text() == plain(text) and not ax.title.get_parse_math()
