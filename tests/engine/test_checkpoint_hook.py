"""The file backend of the checkpoint hook; test_loops.py has the hook in runs."""

from mmdense.engine.checkpoint_hook import AtomicFileBackend


def test_removal_is_deferred(tmp_path):
    backend = AtomicFileBackend()
    backend.put(b'1', tmp_path / 'folder/a')
    backend.remove(tmp_path / 'folder/a')
    assert (tmp_path / 'folder/a').read_bytes() == b'1'
    backend.remove_outdated()
    assert not (tmp_path / 'folder/a').exists()
