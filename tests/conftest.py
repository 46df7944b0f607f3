"Slow tests (full-size models, servers, long runs) run only when asked for: `pytest --slow`, or `-m slow`"
import os
from zlib import crc32

import pytest
import torch

# nothing here needs the network, and the hub retries for half a minute
os.environ.setdefault('HF_HUB_OFFLINE', '1')


# files that take longest: two processes begin with them, and end together
LONG = ('examples cli plan training folder engine models golden site policy_methods attack family lab '
        'end_to_end').split()


def pytest_addoption(parser): parser.addoption('--slow', action='store_true', help='run slow tests too')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes or gigabytes; left out unless asked for')


def pytest_collection_modifyitems(config, items):
    order = {f'test_{name}': i for i, name in enumerate(LONG)}
    items.sort(key=lambda i: order.get(i.path.stem, len(LONG)))
    if config.getoption('--slow') or 'slow' in (config.option.markexpr or ''): return
    slow = [i for i in items if 'slow' in i.keywords]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [i for i in items if 'slow' not in i.keywords]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a tiny SDXL pipeline, prompts and a reward"
    from shared import fill
    return fill(tmp_path_factory.mktemp('made'))


def seeded(name): torch.manual_seed(crc32(name.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    "Random weights of a fixture are the same in every run and every order of tests"
    seeded(f'{fixturedef.baseid} {fixturedef.argname}')


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    "And so are those a test draws itself"
    seeded(item.nodeid)
