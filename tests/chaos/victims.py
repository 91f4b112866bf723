"""The processes of a submission: which there are, and what hurts them."""

from __future__ import annotations

import signal
import time

import psutil

from tests.worker_zygote import list_forked

PROCESSES = {"worker": "RayTrainWorker", "controller": "TrainController", "raylet": "/raylet", "head": "/gcs_server"}
"""Part of the name or of the command line, by what it is called here."""
EFFECT_TIMEOUT_S = 10


def hurt(victim: psutil.Process, number: signal.Signals) -> bool:
    """Sends a signal; whether the process lived and then died or stood still. An end that is asked for shows later."""
    try:
        if victim.status() == psutil.STATUS_ZOMBIE:
            return False
        victim.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    deadline = time.monotonic() + EFFECT_TIMEOUT_S
    while number != signal.SIGTERM and not has_ended(victim, number):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def has_ended(victim: psutil.Process, number: signal.Signals) -> bool:
    """Whether a process is no more, or stands still where it was told to."""
    wanted = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, *((psutil.STATUS_STOPPED,) if number == signal.SIGSTOP else ()))
    try:
        return victim.status() in wanted
    except psutil.NoSuchProcess:
        return True


def find_family(pid: int) -> list[psutil.Process]:
    """A driver, everything below it, and the workers that were forked for it: one submission runs at a time."""
    try:
        driver = psutil.Process(pid)
        return [driver, *driver.children(recursive=True), *list_forked()]
    except psutil.NoSuchProcess:
        return []


def is_victim(process: psutil.Process, victim: str, driver: int) -> bool:
    """Whether a process is of the kind that a fault hits."""
    return process.pid == driver if victim == "driver" else PROCESSES[victim] in name_process(process)


def name_process(process: psutil.Process) -> str:
    """Its command, or nothing once it is gone."""
    try:
        return (process.cmdline() or [process.name()])[0]
    except psutil.Error:
        return ""


def end_all(processes: list[psutil.Process]) -> None:
    """Ends processes that this storm started."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def go_on(processes: list[psutil.Process]) -> None:
    """Lets stopped processes go on, those that are still there."""
    for process in processes:
        try:
            process.resume()
        except psutil.NoSuchProcess:
            continue
