"""The batch job of deploy/ray as it runs: Ray in its own environment, two workers, killed processes, hostile files."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from foodextract.data import scenes
from foodextract.inference.output_files import PLAIN
from foodextract.models import loading
from foodextract.schema import as_row
from test_deploy import VERSION, documents, kubernetes_validate

ROOT = Path(__file__).parents[1]
RAY = ROOT / "deploy" / "ray"
COUNT = 2000
DRAWN = 50  # different ones; the others are copies, since drawing takes longer than answering
# A decoder that crashes, as native code does on some files. Python imports this module in every process of the job.
CRASHES = """
import os, signal
from PIL import Image
opened = Image.open
def open_or_crash(file, *arguments, **options):
    if b"poison" in getattr(file, "getvalue", bytes)():
        os.kill(os.getpid(), signal.SIGSEGV)
    return opened(file, *arguments, **options)
Image.open = open_or_crash
"""


@pytest.fixture(scope="module")
def python():
    """The Python of Ray's environment, which `make test-slow` makes."""
    environment = Path(os.environ.get("FOODEXTRACT_RAY_ENV") or Path(sys.prefix) / "ray")
    if not (environment / "bin" / "ray").exists():
        pytest.skip(f"Ray is not installed in {environment}: `make .venv/ray/.installed` does it")
    return environment / "bin" / "python"


@pytest.fixture(scope="module")
def drawn():
    return [encoded(scenes.draw_scene(83, "test", number).image) for number in range(DRAWN)]


def encoded(image):
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def bomb():
    """A PNG of 3,600 megapixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\1IDAT"


def start(python, folder, *arguments):
    """Start the job, again if the machine is too busy for the 30 s in which Ray must come up."""
    (folder / "sitecustomize.py").write_text(CRASHES)
    command = [python, RAY / "label_many.py", *arguments, "--model", loading.TINY_TUNED, "--workers", "2"]
    paths = f"{folder}{os.pathsep}{ROOT / 'src'}"
    # By default Ray's workers give way to all else, such as the tests beside this one.
    settings = {"OMP_NUM_THREADS": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_worker_niceness": "0"}
    environment = {**os.environ, **settings, "PYTHONPATH": paths}
    for _ in range(3):
        with (folder / "log.txt").open("w") as log:
            job = subprocess.Popen(list(map(str, command)), env=environment, cwd=folder, stdout=log, stderr=log)
        while job.poll() is None and "Started a local Ray instance" not in (folder / "log.txt").read_text():
            time.sleep(0.2)
        if job.poll() is None or "timed out during startup" not in (folder / "log.txt").read_text():
            break
    return job


def finish(job, folder):
    assert job.wait(timeout=900) == 0, (folder / "log.txt").read_text()[-5000:]


def lines_of(folder):
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def wait_for(count, answers, job):
    """Wait until the checkpoint names `count` images."""
    while job.poll() is None:
        done = [path for path in Path(f"{answers}.checkpoint").glob("*.parquet") if ".pending" not in path.name]
        if sum(pq.read_metadata(path).num_rows for path in done) >= count:
            return
        time.sleep(0.2)
    raise AssertionError(f"the job ended early: {(answers.parent / 'log.txt').read_text()[-5000:]}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_image_has_one_row_whatever_dies(python, drawn, tmp_path):
    """A worker is killed in the first run, then the whole machine; the second run finishes; a third has nothing to do."""
    images, answers = tmp_path / "images", tmp_path / "answers"
    for number in range(COUNT):
        path = images / f"{number % 10}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn[number % DRAWN])
    bad = {"poison.png": b"poison", "bomb.png": bomb(), "cut.png": drawn[0][:2000], "empty.png": b""}
    for name, data in bad.items():
        (images / "5" / name).write_bytes(data)
    job = start(python, tmp_path, images, answers, "--format", "jsonl", "--rows-per-file", "100")
    family = psutil.Process(job.pid)
    wait_for(200, answers, job)
    workers = [one for one in family.children(recursive=True) if "MapWorker" in " ".join(one.cmdline())]
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    wait_for(600, answers, job)
    for process in [family, *family.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # Ray's processes end with one another
            process.kill()
    job.wait()
    first = lines_of(answers)
    assert 600 <= len(first) < COUNT

    finish(start(python, tmp_path, images, answers, "--format", "jsonl", "--rows-per-file", "100"), tmp_path)
    lines = lines_of(answers)
    assert Counter(line["file"] for line in lines) == Counter(map(str, images.rglob("*.png")))
    errors = {Path(line["file"]).name: line["error"] for line in lines if "error" in line}
    assert errors.keys() == bad.keys()
    assert errors["poison.png"].startswith("killed 3 decoders")
    assert "megapixels" in errors["bomb.png"]
    assert all(list(line) == [name for name in PLAIN if name in line] for line in lines)

    files = sorted(answers.iterdir())
    finish(start(python, tmp_path, images, answers, "--format", "jsonl"), tmp_path)
    assert sorted(answers.iterdir()) == files


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_shards_by_url_give_the_rows_of_extract(python, drawn, tuned, tmp_path):
    """Parquet as `datasets` writes it, in a zip file; webdataset by a file URL. Answers: parquet with the same columns."""
    few, (parquet, tar) = drawn[:8], (tmp_path / "images.zip", tmp_path / "shards" / "0.tar")
    table = pa.table(
        {"image": [{"bytes": data, "path": None} for data in few], "id": [f"a{i}" for i in range(len(few))]}
    )
    pq.write_table(table, file := io.BytesIO())
    with zipfile.ZipFile(parquet, "w") as archive:
        archive.writestr("train/0.parquet", file.getvalue())
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as archive:
        for number, data in enumerate(few):
            for name, member in ((f"b{number}.json", b"{}"), (f"b{number}.png", data)):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                archive.addfile(info, io.BytesIO(member))
    results = list(tuned.extract_many(few))
    for source, options, name in (
        (f"zip://train::file://{parquet}", ["--key", "id"], "train/0.parquet#a{}"),
        (tar.parent.as_uri(), [], f"{tar}#b{{}}"),
    ):
        answers = tmp_path / "answers" / name[-3]
        finish(start(python, tmp_path, source, answers.as_uri(), *options), tmp_path)
        rows = sorted(pq.read_table(answers).to_pylist(), key=lambda row: row["file"])
        assert [{key: value for key, value in row.items() if value is not None} for row in rows] == [
            as_row(name.format(number), result) for number, result in enumerate(results)
        ]
        assert tuple(rows[0]) == PLAIN


def test_the_ray_environment_has_the_locked_versions():
    lock = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in (RAY / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert [pin for pin in pins if pin not in {line.split(" ;")[0] for line in lock}] == ["ray[data]==2.60.0"]
    assert "FROM rayproject/ray:2.60.0-" in (RAY / "Dockerfile").read_text()


def test_the_ray_job_fits_the_kubernetes_schemas():
    """The pods and what is beside the job, strictly. The job's own kind is KubeRay's, which the validator does not know."""
    [job, *others] = documents((RAY / "kuberay.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == "2.60.0"
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [{"apiVersion": "v1", "kind": "Pod", **group["template"]} for group in groups]
    for document in [*pods, *others]:
        kubernetes_validate.validate(document, VERSION, strict=True)
    claims = {one["metadata"]["name"] for one in others if one["kind"] == "PersistentVolumeClaim"}
    base = yaml.safe_load((ROOT / "deploy/kubernetes/base/model.yaml").read_text())
    for pod in pods:
        volumes = pod["spec"]["volumes"]
        used = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume}
        assert used == claims | {base["metadata"]["name"]}
        [container] = pod["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in volumes}
        assert container["resources"]["requests"] == container["resources"]["limits"]
    help_ = job["spec"]["entrypoint"].split()
    assert help_[:2] == ["python", "/app/label_many.py"]
    assert f"--cpus {groups[1]['template']['spec']['containers'][0]['resources']['limits']['cpu']}" in " ".join(help_)
