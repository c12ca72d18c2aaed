"""Label millions of images with Ray Data, on one machine or on a cluster.

    python deploy/ray/label_many.py IMAGES ANSWERS --model outputs/mine/stage2 --workers 2

IMAGES is a folder of images, or of parquet files (*.parquet) or webdataset shards (*.tar); a path or a URL that fsspec
knows. ANSWERS becomes a folder of parquet or JSONL files: every image gets one row with the columns of `foodextract
extract`, its record or its error. `file` is the image's path, or `shard#key` of an image in a shard.

Rerun the command to resume. ANSWERS.checkpoint, which Ray Data writes, lists the images that have their row. Read
ANSWERS when the command has ended: a file that a killed worker left incomplete is removed by the next run.

Needs an environment of its own: requirements.txt beside this file, and this package.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec
import numpy as np
import pyarrow as pa
import ray
import typer
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.block import Block, BlockAccessor
from ray.data.checkpoint import CheckpointConfig, NumpyArrayBasedCheckpointFilter
from ray.data.datasource import BlockBasedFileDatasink

from foodextract import schema
from foodextract.images import SUFFIXES, ImageError, find_images, open_image
from foodextract.schema import AnswerError, FoodRecord, as_row

ANSWER_TOKENS = 256
BLOCK_BYTES = 32 * 2**20  # of images: what a killed worker repeats
BATCH = 256  # rows per call of a worker
DECODERS = 2  # processes per worker that decode ahead of its model
DECODE_ATTEMPTS = 3  # an image is at fault if it kills this many processes
DECODE_TIMEOUT = 120  # seconds per image
DECODER_IDLE_MS = "600000"  # Ray ends a process that idles for 1 s: decoders would start anew for every slow batch
WORKER_ATTEMPTS = 4  # the job ends if a block of images kills its worker this often
COLUMNS = pa.schema(
    {
        "file": pa.string(),
        "is_food": pa.int64(),
        "image_title": pa.string(),
        "food_items": pa.list_(pa.string()),
        "drink_items": pa.list_(pa.string()),
        "error": pa.string(),
    }
)

Format = Literal["parquet", "jsonl"]
Result = FoodRecord | ImageError | AnswerError
Engine = Callable[[Iterator[np.ndarray]], Iterable[Result]]  # RGB images → results, in order


# --- reading


def located(url: str) -> tuple[str, PyFileSystem]:
    """Return the path of a URL and its file system, as fsspec resolves it. A local path becomes absolute."""
    filesystem, path = fsspec.core.url_to_fs(url)
    return path, PyFileSystem(FSSpecHandler(filesystem))


@dataclass(frozen=True)
class Source:
    """Images as a dataset, and its columns: `image` holds the files, `key` tells apart those of one `path`."""

    rows: Dataset
    image: str = "bytes"
    key: str | None = None


def read(images: str, column: str, key: str | None) -> Source:
    """Open images: files if there are any of a known suffix, otherwise parquet files or webdataset shards."""
    path, filesystem = located(images)
    names = filesystem.handler.fs.find(path) or [path]
    suffixes = {Path(name).suffix.lower() for name in names}
    options = {"filesystem": filesystem, "include_paths": True}
    if suffixes & SUFFIXES or not suffixes & {".parquet", ".tar"}:
        local = isinstance(filesystem.handler.fs, LocalFileSystem)
        files = find_images([path]) if local else (name for name in names if Path(name).suffix.lower() in SUFFIXES)
        return Source(ray.data.read_binary_files(list(map(str, files)), **options))
    if suffixes >= {".parquet", ".tar"}:
        raise typer.BadParameter(f"{images} holds shards of two kinds: name a folder of one")
    if ".tar" in suffixes:
        decoder = [_first_image]
        rows = ray.data.read_webdataset(path, suffixes=_is_image_suffix, decoder=decoder, **options)
        return Source(rows, key="key")
    rows = ray.data.read_parquet(path, include_row_hash=not key, **options)
    key = key or "row_hash"
    return Source(rows.select_columns([column, "path", key]), column, key)


def _is_image_suffix(suffix: str) -> bool:
    return Path(f"_.{suffix}").suffix.lower() in SUFFIXES


def _first_image(sample: dict[str, Any]) -> dict[str, Any]:
    """Reduce a webdataset sample to its key and its first image."""
    image = next((value for name, value in sample.items() if not name.startswith("__")), None)
    return {"key": sample["__key__"], "bytes": image}


def names_of(table: pa.Table, key: str | None) -> list[str]:
    """Return the `file` of each row: unique among all rows."""
    paths = table["path"].to_pylist()
    return [f"{path}#{one}" for path, one in zip(paths, table[key].to_pylist(), strict=True)] if key else paths


def unanswered(key: str | None) -> type[NumpyArrayBasedCheckpointFilter]:
    """Return Ray's filter of rows in the checkpoint. It compares a column that was read; `file` is composed."""

    class Unanswered(NumpyArrayBasedCheckpointFilter):
        def filter_rows_for_block(self, block: Block) -> Block:
            table = BlockAccessor.for_block(block).to_arrow()
            named = table.append_column("file", pa.array(names_of(table, key), pa.string()))
            return super().filter_rows_for_block(named).drop_columns("file")

    return Unanswered


# --- answering


@ray.remote(num_cpus=0, max_retries=DECODE_ATTEMPTS - 1)
def decode(data: bytes | None) -> np.ndarray | ImageError:
    """Decode one image in a process that it may kill."""
    try:
        return np.asarray(open_image(data or b""))
    except ImageError as error:
        return error


def decoded(images: Iterable[bytes | None]) -> Iterator[np.ndarray | ImageError]:
    """Decode ahead of the model. An image that kills its process, or takes too long, becomes an ImageError."""
    ahead: deque[ray.ObjectRef] = deque()
    for image in images:
        if len(ahead) == DECODERS:
            yield _outcome(ahead.popleft())
        ahead.append(decode.remote(image))
    yield from map(_outcome, ahead)


def _outcome(reference: ray.ObjectRef) -> np.ndarray | ImageError:
    try:
        return ray.get(reference, timeout=DECODE_TIMEOUT)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        return ImageError(f"decoding took more than {DECODE_TIMEOUT} s: save it again with another program")
    except ray.exceptions.RayError as error:
        reason = type(error).__name__
        return ImageError(f"killed {DECODE_ATTEMPTS} decoders ({reason}): save it again with another program")


class Worker:
    """An actor that loads the engine once and answers batches of images."""

    def __init__(self, load: Callable[[], Engine], image: str, key: str | None) -> None:
        self.engine, self.image, self.key = load(), image, key

    def __call__(self, batch: pa.Table) -> pa.Table:
        data = batch[self.image].combine_chunks()
        if pa.types.is_struct(data.type):  # {"bytes", "path"}, as `datasets` stores an image
            data = data.field("bytes")
        if not (pa.types.is_binary(data.type) or pa.types.is_large_binary(data.type) or pa.types.is_null(data.type)):
            raise TypeError(f"{self.image} is a column of {data.type}, not of image files: name another with --column")
        results = zip(names_of(batch, self.key), self.results(data.to_pylist()), strict=True)
        return pa.Table.from_pylist([as_row(file, result) for file, result in results], COLUMNS)

    def results(self, images: list[bytes | None]) -> list[Any]:
        """Answer images together, or one by one if the engine fails. Raises the failure if each of them fails."""
        errors: dict[int, ImageError] = {}

        def readable() -> Iterator[np.ndarray]:
            for number, image in enumerate(decoded(images)):
                if isinstance(image, ImageError):
                    errors[number] = image
                else:
                    yield image

        try:
            answers = iter(list(self.engine(readable())))
            return [errors.get(number) or next(answers) for number in range(len(images))]
        except Exception as error:
            if len(images) == 1:
                return [RuntimeError(f"the engine failed: {error}")]
            results = [result for image in images for result in self.results([image])]
            if all(isinstance(result, RuntimeError) for result in results):
                raise
            return results


def load_extractor(model: str, batch_size: int) -> Engine:
    """Load our extractor, on the GPU that Ray gave to this worker or on the CPU."""
    from foodextract.inference.extractor import Extractor

    extractor = Extractor.from_pretrained(model)
    return lambda images: extractor.extract_many(images, batch_size)


def load_vllm(model: str, batch_size: int) -> Engine:
    """Load vLLM in this worker; it answers greedily under the schema and batches by itself."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from foodextract.data.teacher import Teacher, as_data_url, question

    engine = LLM(
        model=model, limit_mm_per_prompt={"image": 1, "video": 0}, structured_outputs_config={"backend": "guidance"}
    )
    guided = StructuredOutputsParams(json=schema.guided_schema())
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, structured_outputs=guided)
    template = Path(model, "chat_template.jinja").read_text()
    options = {"use_tqdm": False, "chat_template": template, "chat_template_content_format": "openai"}

    def answers(images: Iterator[np.ndarray]) -> list[Result]:
        urls = [as_data_url(image, Teacher.max_edge) for image in images]
        asked = [question(Teacher("", ""), url)["messages"] for url in urls]
        return [_parsed(output.outputs[0].text) for output in engine.chat(asked, params, **options)] if asked else []

    return answers


def _parsed(text: str) -> FoodRecord | AnswerError:
    try:
        return FoodRecord.from_json(text)
    except AnswerError as error:
        return error


ENGINES = {"extractor": load_extractor, "vllm": load_vllm}


# --- writing


class JsonLines(BlockBasedFileDatasink):
    """Lines as `foodextract extract` writes them. Ray's own write_json turns integers beside nulls into floats."""

    def write_block_to_file(self, block: BlockAccessor, file: pa.NativeFile) -> None:
        for row in block.to_arrow().to_pylist():
            line = json.dumps({name: value for name, value in row.items() if value is not None})
            file.write(f"{line}\n".encode())


def label(
    images: str,
    answers: str,
    load: Callable[[], Engine],
    workers: int,
    form: Format = "parquet",
    rows_per_file: int = 1000,
    column: str = "image",
    key: str | None = None,
    **resources: float,
) -> None:
    """Answer the images that have no row yet. `resources` of a worker: num_cpus, num_gpus."""
    DataContext.get_current().target_max_block_size = BLOCK_BYTES
    path, filesystem = located(answers.rstrip("/"))
    source = read(images, column, key)
    rows = source.rows.map_batches(
        Worker,
        fn_constructor_args=(load, source.image, source.key),
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=workers),
        ray_remote_args_fn=lambda: {"max_task_retries": WORKER_ATTEMPTS - 1},
        **resources,
    )
    rows.context.checkpoint_config = CheckpointConfig(  # `read` has copied the current context
        "file",
        f"{path}.checkpoint",
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,  # a later run labels only what is new
        checkpoint_filter_cls=unanswered(source.key),
    )
    if form == "parquet":
        rows.write_parquet(path, filesystem=filesystem, min_rows_per_file=rows_per_file)
    else:
        sink = JsonLines(path, filesystem=filesystem, min_rows_per_file=rows_per_file, file_format="jsonl")
        rows.write_datasink(sink)


def start(address: str | None, workers: int, cpus: float) -> None:
    """Connect to a cluster, or start Ray here: without a dashboard, on all interfaces, behind a token."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        ray.init(address)
    else:
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", DECODER_IDLE_MS)
        slots = int(workers * cpus) + 2  # two more for reading, filtering and writing, which take little
        ray.init("local", num_cpus=slots, include_dashboard=False)


def main(
    images: Annotated[str, typer.Argument(help="Folder or URL of images, parquet files or webdataset shards.")],
    answers: Annotated[str, typer.Argument(help="Folder or URL for the answers.")],
    model: Annotated[str, typer.Option(help="Model folder or Hub id; for vLLM what `foodextract export vllm` wrote.")],
    engine: Annotated[Literal["extractor", "vllm"], typer.Option(help="What answers.")] = "extractor",
    workers: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs per worker; with several, its threads.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs per worker; 0.5 puts two on one.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Tiles per forward pass of the extractor.")] = 8,
    form: Annotated[Format, typer.Option("--format", help="Of the answers.")] = "parquet",
    rows_per_file: Annotated[int, typer.Option(min=1, help="The least, but for the last file.")] = 1000,
    column: Annotated[str, typer.Option(help="Parquet column of the images: bytes, or {bytes, path}.")] = "image",
    key: Annotated[
        str | None, typer.Option(help="Parquet column of unique keys. Default: a hash of file and position.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="`auto` inside a Ray cluster. Default: this machine.")] = None,
) -> None:
    """Label IMAGES, or the rest of them."""
    model = str(Path(model).resolve()) if Path(model).exists() else model  # workers may run in other folders
    start(address, workers, cpus)
    load = partial(ENGINES[engine], model, batch_size)
    label(images, answers, load, workers, form, rows_per_file, column, key, num_cpus=cpus, num_gpus=gpus)
    print(json.dumps({"answers": answers}))


if __name__ == "__main__":
    typer.run(main)
