"""MediaPool: worker processes that open, sample, resize and hash media, so that a crash or a hang costs one request.

A worker is `python -m atb_pllava.multimodal.media_worker`, which knows nothing of the program that uses the pool. A
script without `if __name__ == "__main__"` therefore runs once. Frames come back as uint8 in anonymous shared memory.
`VideoProcessor` takes a pool as an option. Only callers that make a pool import this module and msgspec.
"""

import logging
import os
import threading
import weakref
from collections.abc import Sequence

import msgspec
import numpy as np

from atb_pllava.errors import PllavaError, VideoError, check_whole_number
from atb_pllava.multimodal.frame_sampling import check_indices
from atb_pllava.multimodal.image_sequence import ImageSequence
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_file import GIVEN_BYTES, check_file_size
from atb_pllava.multimodal.options import MOST_WORKERS
from atb_pllava.multimodal.processor import (
    FrameIndices,
    Media,
    ProcessedVideo,
    TimeRange,
    VideoProcessor,
    check_frames,
)
from atb_pllava.multimodal.shared_bytes import read_array, share
from atb_pllava.multimodal.worker_messages import (
    ArrayMedium,
    BytesMedium,
    Done,
    Failed,
    ImagesMedium,
    Job,
    Medium,
    PathMedium,
)
from atb_pllava.multimodal.worker_process import WorkerDiedIdleError, WorkerProcess

_USUAL_WORKERS = 8  # at most, by default: more readers than that wait for memory and disks


class MediaPool:
    """At most `workers` processes (None: one for each core, at most 8). Threads may share a pool.

    A worker starts when a job finds all others busy. Idle workers wait for the next job. All workers end with `close`,
    with the pool, and with this process, however it ends. A forked child starts workers of its own.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.size = default_workers() if workers is None else check_whole_number("workers", workers, 1, MOST_WORKERS)
        self._begin()
        _POOLS.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(self.size)
        self._idle: list[WorkerProcess] = []
        self._workers: set[WorkerProcess] = set()  # busy ones too
        self._is_closed = False
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, self._idle)

    def prepare(
        self,
        processor: VideoProcessor,
        media: Sequence[Media],
        frame_indices: Sequence[FrameIndices],
        time_ranges: Sequence[TimeRange],
    ) -> list[ProcessedVideo]:
        """What `processor.prepare_here` returns for the same arguments. Waits for a free worker and for its answer.

        Raises the errors of `prepare_here`. Raises VideoError, which names the medium, when the worker crashes, or when
        it reads one medium for longer than max_decode_seconds and a grace. Raises BackendError when no worker starts.
        """
        job, contents = _job_of(processor, media, frame_indices, time_ranges)
        names = [_name_of(item) for item in media]
        with self._slots:
            memory = share(contents) if contents else None
            try:
                try:
                    answer, frames = self._ask(job, memory, names)
                except WorkerDiedIdleError:
                    answer, frames = self._ask(job, memory, names)
            finally:
                if memory is not None:
                    os.close(memory)
        return _videos_of(answer, frames, processor, names)

    def start_worker(self) -> None:
        """Start a worker before a job needs it. Returns at once. Errors of its start come from the job."""
        with self._lock:
            if not self._is_closed and not self._workers:
                worker = WorkerProcess()
                self._workers.add(worker)
                self._idle.append(worker)

    def close(self) -> None:
        """End all workers. Jobs under way and later ones raise VideoError. May be called several times."""
        with self._lock:
            self._is_closed = True
        self._finalizer()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that run now."""
        with self._lock:
            return [worker.pid for worker in self._workers]

    def _ask(self, job: Job, memory: int | None, names: Sequence[str]) -> tuple[Done | Failed, int | None]:
        """A worker's answer to the job. The worker ends when the job ends in any other way than with an answer."""
        worker, busy = self._take(names[0])
        try:
            job = msgspec.structs.replace(job, decoder_threads=max(1, cores() // busy))
            answer = worker.run(job, memory, names)
        except BaseException as error:
            self._drop(worker)
            if self._is_closed and isinstance(error, PllavaError):
                raise _closed(names[0]) from None
            raise
        with self._lock:
            if not self._is_closed:
                self._idle.append(worker)
                return answer
        self._drop(worker)
        return answer

    def _take(self, name: str) -> tuple[WorkerProcess, int]:
        """An idle worker or a new one, and the number of workers that are busy now, with this one."""
        with self._lock:
            if self._is_closed:
                raise _closed(name)
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive:
                    break
                worker.close()
                self._workers.discard(worker)
            else:
                worker = WorkerProcess()
                self._workers.add(worker)
            return worker, len(self._workers) - len(self._idle)

    def _drop(self, worker: WorkerProcess) -> None:
        worker.kill()
        worker.close()
        with self._lock:
            self._workers.discard(worker)

    def _forget_workers(self) -> None:
        """In a forked child: begin without workers. Those there are belong to the parent."""
        self._finalizer.detach()
        for worker in self._workers:
            worker.forget()
        self._begin()


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """One worker for each core, at most 8."""
    return min(_USUAL_WORKERS, cores())


def _kill_all(workers: set[WorkerProcess], idle: list[WorkerProcess]) -> None:
    """End the workers. The thread that a busy worker works for closes its socket."""
    for worker in list(workers):
        worker.kill()
    while idle:
        idle.pop().close()
    workers.clear()


def _forget_all_workers() -> None:
    for pool in _POOLS:
        pool._forget_workers()


_POOLS: weakref.WeakSet[MediaPool] = weakref.WeakSet()
os.register_at_fork(after_in_child=_forget_all_workers)


def _job_of(
    processor: VideoProcessor,
    media: Sequence[Media],
    frame_indices: Sequence[FrameIndices],
    time_ranges: Sequence[TimeRange],
) -> tuple[Job, list[bytes | np.ndarray]]:
    """The job of reading these media, and the contents that travel in shared memory beside it."""
    parts: list[Medium] = []
    contents: list[bytes | np.ndarray] = []
    for item in media:
        if isinstance(item, ImageSequence):
            parts.append(ImagesMedium([_file_part(image, contents, processor.limits) for image in item.images]))
        elif isinstance(item, np.ndarray):
            check_frames(item)
            parts.append(ArrayMedium(item.shape))
            contents.append(item)
        else:
            parts.append(_file_part(item, contents, processor.limits))
    job = Job(
        media=parts,
        frame_indices=[
            # A number above the limits of every file would be refused by the worker, with the file's own bound.
            None if wanted is None else check_indices(wanted, processor.limits.max_frames, _name_of(item))
            for item, wanted in zip(media, frame_indices, strict=True)
        ],
        time_ranges=list(time_ranges),
        num_frames=processor.num_frames,
        preprocessor=processor.preprocessor,
        frame_sampler=processor.frame_sampler,
        resize=processor.resize,
        limits=processor.limits,
        directory=_working_directory(),
        log_level=logging.getLogger("atb_pllava").getEffectiveLevel(),
        decoder_threads=1,
    )
    return job, contents


def _file_part(
    item: str | os.PathLike[str] | bytes, contents: list[bytes | np.ndarray], limits: MediaLimits
) -> PathMedium | BytesMedium:
    """The part of a message for one file. Appends a file's content given as bytes to `contents`."""
    if not isinstance(item, bytes):
        return PathMedium(os.fsencode(item))
    check_file_size(len(item), GIVEN_BYTES, limits)
    contents.append(item)
    return BytesMedium(len(item))


def _videos_of(
    answer: Done | Failed, descriptor: int | None, processor: VideoProcessor, names: Sequence[str]
) -> list[ProcessedVideo]:
    """The videos of an answer. Logs what the worker logged. Raises the worker's error. Closes the descriptor."""
    try:
        for line in answer.log:
            logging.getLogger(line.logger).log(line.level, "%s", os.fsdecode(line.text))
        if isinstance(answer, Failed):
            raise _error_of(answer, names)
        assert descriptor is not None
        videos = []
        offset = 0
        for part in answer.videos:
            frames = read_array(descriptor, offset, part.shape)
            offset += frames.nbytes
            videos.append(
                ProcessedVideo(
                    frames,
                    part.inverse_indices,
                    part.frame_indices,
                    processor.preprocessor,
                    known_hash=part.mm_hash,
                    source=part.source,
                )
            )
        return videos
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _error_of(answer: Failed, names: Sequence[str]) -> Exception:
    text = os.fsdecode(answer.text)
    if answer.kind == "media":
        assert answer.cause is not None
        return VideoError(text, answer.cause)
    if answer.kind == "memory":
        return MemoryError(text)
    if answer.kind == "system":
        return VideoError(f"{', '.join(names)}: could not be read: {text}", "out_of_resources")
    remedy = "please report it"
    return VideoError(f"{', '.join(names)}: not read because of an error in atb_pllava: {text}; {remedy}", "internal")


def _closed(name: str) -> VideoError:
    return VideoError(f"{name}: not read, because the media pool was closed", "closed")


def _name_of(item: Media) -> str:
    """The name of a medium in messages, as `media_file.open_media` and `processor` have it."""
    if isinstance(item, bytes):
        return GIVEN_BYTES
    if isinstance(item, ImageSequence):
        return item.name
    return "frames" if isinstance(item, np.ndarray) else os.fsdecode(item)


def _working_directory() -> bytes | None:
    try:
        return os.getcwdb()
    except OSError:  # somebody has deleted the folder
        return None
