"""Checkpoints: written beside the training, found, verified, read by any layout, and written anew.

    checkpoints/step_00000200/
        state.json    format, step, samples seen, config, layout, data fingerprint, versions, files, sizes, checksums
        tensors/      weights and moments of AdamW in float32, by name: see `sharded_tensors`

A checkpoint belongs to no layout: tensors are whole whoever wrote them, and every process reads its own part. Resuming
reads all of them; export, evaluation, stage 2 and notebooks read the weights. Randomness and data order are pure
functions of (seed, step), so `step` is their state and the counter of AdamW.

state.json holds the checksum of the index of the tensors and its own, and the index those of all pieces. They
are written by `writer`; what a run resumes from is chosen by `resume`.
"""
