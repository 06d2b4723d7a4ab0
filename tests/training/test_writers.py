"""The files of metrics of a run that goes on after a kill."""

import struct

from tensorboardX.proto import event_pb2

from duo_jax.training import writers


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 0.5}\n{"step": 3, "a"')
    assert [row["step"] for row in writers.read_jsonl(path)] == [1, 2]
    log = writers.JsonlWriter(path, last_step=2)
    log.write_scalars(3, {"a": 0.25})
    log.close()
    assert path.read_text() == '{"step": 1, "a": 1.0}\n{"step": 2, "a": 0.5}\n{"step": 3, "a": 0.25}\n'


def test_tensorboard_hides_only_the_steps_that_are_taken_anew(tmp_path):
    curves = writers.TensorBoardWriter(tmp_path, last_step=20)
    curves.write_scalars(21, {"train/loss": 3.0})
    curves.close()
    (file,) = tmp_path.iterdir()
    data, events = file.read_bytes(), []
    while data:  # each event between a length with its checksum, 8 + 4 bytes, and a checksum of 4
        (size,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    starts = [event.step for event in events if event.session_log.status == event_pb2.SessionLog.START]
    assert starts == [21], "TensorBoard drops what earlier files have from this step on"
    assert [event.step for event in events if event.summary.value] == [21]
