"""What is tested, on which device, by how many processes, at which cost."""

import contextlib
import os
import pathlib
import tempfile
import types
import weakref

import pytest

from tests import counting, profiles

# Keras is imported by the processes that run tests, not by the one that only
# hands tests out: they start at once.
profiles.register()
REPORTS = pytest.StashKey()
CACHE = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default=None,
        help="where to compute, as gpu:0 or cpu:0 (default: a GPU if any)",
    )


def hands_out(config):
    """Whether other processes run the tests of this one."""
    return bool(config.getoption("numprocesses", 0))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """As many processes as there are cores, where pytest-xdist is installed.

    Those of a GPU would take its memory from each other.
    """
    has_gpu = any(pathlib.Path("/dev").glob("nvidia[0-9]"))
    is_one_of_them = hasattr(config, "workerinput")
    if config.pluginmanager.hasplugin("xdist") and not is_one_of_them:
        if config.option.numprocesses is None and not has_gpu:
            config.option.numprocesses = "auto"
            config.option.dist = "worksteal"


def pytest_configure(config):
    config.stash[REPORTS] = []
    if hasattr(config, "workerinput"):
        return
    # What JAX has compiled once, no other process compiles again.
    config.stash[CACHE] = tempfile.TemporaryDirectory()
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", config.stash[CACHE].name
    )
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_unconfigure(config):
    if CACHE in config.stash:
        config.stash[CACHE].cleanup()


def pytest_sessionstart(session):
    if hands_out(session.config):
        return
    from tests import reference

    counting.count_models()
    # Before anything is computed.
    reference.split_the_processor()
    if keras_backend() == "tensorflow":
        leave_data_untuned()


def keras_backend():
    import keras

    return keras.backend.backend()


def leave_data_untuned():
    """Has no thread tune the data of a fit.

    With it, a process was idle for up to two minutes now and then, its main
    thread waiting (TensorFlow 2.21). Without it none was seen so.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    apply_options = tf.data.Dataset._apply_debug_options

    def untuned(self):
        return apply_options(self).with_options(options)

    tf.data.Dataset._apply_debug_options = untuned


def pytest_collection_modifyitems(config, items):
    """Leaves out what only the nightly profile runs."""
    if profiles.is_nightly():
        return
    left_out = [item for item in items if item.get_closest_marker("nightly")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session):
    config = session.config
    if hands_out(config):
        return
    report = {**counting.report(), "place": place(config)}
    if hasattr(config, "workeroutput"):
        config.workeroutput["kaccum"] = report
    else:
        config.stash[REPORTS].append(report)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Keeps what a process did."""
    if not error and "kaccum" in node.workeroutput:
        node.config.stash[REPORTS].append(node.workeroutput["kaccum"])


def pytest_terminal_summary(terminalreporter, config):
    reports = config.stash[REPORTS]
    if reports:
        terminalreporter.write_line(
            f"kaccum computed on {reports[0]['place']}, profile "
            f"{profiles.name()}"
        )
        terminalreporter.write_line(counting.line_of(reports))


def place(config):
    """Where is computed, in words."""
    import keras

    from kaccum.backends import backend

    device = config.getoption("--device") or backend().device_name()
    return f"{device}, Keras {keras.__version__} on {keras_backend()}"


@pytest.fixture(autouse=True, scope="session")
def device(request):
    """Computes everything on the chosen device, in full precision."""
    import keras

    from kaccum.backends import backend

    chosen = request.config.getoption("--device")
    if chosen is None and keras_backend() == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        # The first of several parts of the processor.
        chosen = "gpu:0" if gpus else "cpu:0"
    place = keras.device(chosen) if chosen else contextlib.nullcontext()
    with backend().full_precision(), place:
        yield


@pytest.fixture(autouse=True, scope="session")
def shared_attributes(device):
    """Of what the table of hooks lists, those of classes and modules."""
    from kaccum.step.hooks import HOOKS

    model = types.SimpleNamespace(_compile_loss=None)
    step = types.SimpleNamespace(optimizer=None, model=model)
    return {
        (owner, hook.attribute): getattr(owner, hook.attribute)
        for hook in HOOKS
        for owner in hook.owners(step)
        if isinstance(owner, (type, types.ModuleType))
    }


@pytest.fixture(autouse=True)
def nothing_stays_patched(monkeypatch, shared_attributes):
    """Fails a test that leaves what the table of hooks lists replaced."""
    from kaccum.fit.session import Session
    from kaccum.step.hooks import HOOKS

    sessions = weakref.WeakSet()
    take_over = Session.take_over

    def recorded(self, *args, **kwargs):
        sessions.add(self)
        return take_over(self, *args, **kwargs)

    monkeypatch.setattr(Session, "take_over", recorded)
    yield
    for session in sessions:
        assert not session.is_installed, "a model stayed patched"
        step = session._step
        owners = [step.optimizer, step.model._compile_loss]
        assert "_aggregate_additional_loss" not in vars(step.model)
        for owner in filter(None, owners):
            left = vars(owner).keys() & {hook.attribute for hook in HOOKS}
            assert not left, f"{owner} stayed patched: {left}"
    for (owner, name), value in shared_attributes.items():
        assert getattr(owner, name) is value, f"{owner}.{name} stayed patched"
