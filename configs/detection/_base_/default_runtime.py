_base_ = 'mmdet::_base_/default_runtime.py'

custom_imports = dict(imports=['mmdense'])
default_hooks = dict(
    checkpoint=dict(type='mmdense.CheckpointHook', max_keep_ckpts=3),
    nan_guard=dict(type='mmdense.NaNGuardHook'))
