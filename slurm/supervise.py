#!/usr/bin/env python3
"""Runs the training of a Slurm job until it is done: tries again after failures, and gives the job back to the queue.

`cola submit` copies this file beside each batch script, which ends in it. It runs on the first node of the job, outside
of any container, so it needs Python 3.6 and nothing else. All it knows of a try is how the tasks of `srun` ended: their
exit codes are those of `cola_megatron.errors`. What it decided stands in events.jsonl beside it, where it also finds
what it did before the job was requeued.

    code of a task                what is done
    0                             the job ends well
    1, 2, 74                      the job ends with that code: the same again would fail again
    75 (saved after a signal)     requeue
    73 (preflight named nodes)    requeue without these nodes
    anything else                 try again here; requeue if a node failed twice, took no tasks, was silent or is down

Tries that end without a new checkpoint are counted, and the job ends after `--tries` of them in a row. A controller of
Slurm that does not answer is waited for; nothing counts as a failure because of it.
"""

import argparse
import contextlib
import glob
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

DONE, FAILED, WRONG_USE, CRASHED, RANK_LOST, BAD_NODE, DIVERGED, STOPPED = 0, 1, 2, 70, 71, 73, 74, 75
KILLED, LAUNCH_FAILED = 128 + signal.SIGKILL, -1
FINAL = (WRONG_USE, FAILED, DIVERGED)
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
LOST_NODE_STATES = re.compile("DOWN|DRAIN|FAIL|NOT_RESPONDING|POWER|REBOOT|UNKNOWN")
TASK_END = re.compile(r"^srun: error: (?P<nodes>\S+): tasks? \S+ (?P<how>.+?)\s*$")
LAUNCH_FAILURE = re.compile(r"^srun: error: .*failed on node (?P<node>\S+): (?P<how>.+?)\s*$")
# Of `launchers/agent.py`: numbers of nodes in the job, from 0.
NO_ANSWER = re.compile(r"^cola: .*: node (?P<node>[0-9]+) of [0-9]+ had no answer from node (?P<silent>[0-9,]+) ")
NOT_STARTED = "not started: "
# From here on tasks end because srun ends them.
AFTERMATH = re.compile("^srun: (First task exited|Job step aborted|Force Terminated|launch/slurm: _step_signal)")
EXIT_CODE = re.compile("[Ee]xit code (?P<code>[0-9]+)")
# What srun itself has to say, and of that what says that it had no answer from the controller.
TROUBLE = re.compile(r"^srun: (error|fatal): ")
OUTAGE = re.compile(
    "unable to contact slurm controller|unable to confirm allocation|socket timed out|zero bytes were transmitted|"
    "unexpected message|controller.* (standby|not respond)|authentication",
    re.IGNORECASE,
)
ASK_AGAIN_SECONDS = 5
IN_VAIN = 10  # tries that others ended before a step was saved, such as a time limit that is too short
PORTS = 12000


class Supervisor:
    """One stay of a job on its nodes."""

    def __init__(self, options):
        self.options = options
        self.job = own_id(os.environ)
        self.path = os.path.join(options.folder, "events.jsonl")
        # A script may be submitted again: what became of another job says nothing of this one.
        self.events = [event for event in read_events(self.path) if event.get("job") == self.job]
        self.signalled = None
        self.step = None
        for number in SIGNALS:
            signal.signal(number, self.receive)

    # ---- signals -----------------------------------------------------------------------------------------------------

    def receive(self, number, frame):
        """The time limit or the owner of the machine: the ranks are told, save and end, and `run` sees them end."""
        self.signalled = signal.Signals(number).name
        if self.step is not None and self.step.poll() is None:
            self.step.send_signal(signal.SIGUSR1)  # srun hands it to its tasks

    # ---- the job -----------------------------------------------------------------------------------------------------

    def run(self):
        """Tries until there is an exit code for the job, and returns it."""
        self.register()
        rival = self.rival()
        if rival:
            reason = f"job {rival} trains this run already; `cola cancel` its run folder first, or let it be"
            return self.stop(FAILED, reason)
        address = os.environ.get("MASTER_ADDR", "")
        if address and not resolves(address):
            return self.stop(FAILED, f"{address}: the first node's name has no address; see address_suffix of the site")
        while True:
            number = 1 + sum(event["event"] == "try" for event in self.events)
            os.environ["COLA_ATTEMPT_BEGAN"] = str(time.time())
            # Others on this node use other ports, and a process left over from the last try keeps its own.
            port = self.options.first_port + (int(os.environ["SLURM_JOB_ID"]) * 16 + number) % PORTS
            os.environ["MASTER_PORT"] = str(port)
            self.write("try", number=number, nodes=self.nodes(), checkpoint=self.checkpoint(), port=port)
            code, failures, outage = self.preflight()
            if code == DONE and self.signalled is None:
                code, failures, outage = self.srun(self.options.train)
            self.write("end", code=code, failures=failures, signal=self.signalled, outage=outage)
            decision = self.decide(code, number)
            if decision is not None:
                return decision

    def register(self):
        """Notes this job where `cola submit` noted it, if it did: whoever submits the script by hand does not."""
        path = os.path.join(self.options.folder, "job_id")
        if self.job not in lines(path):
            append(path, self.job)

    def rival(self):
        """Another job that trains this run and began earlier, or nothing."""
        noted = set()
        for path in glob.glob(os.path.join(glob.escape(self.options.run_folder), "submissions", "*", "job_id")):
            noted.update(lines(path))
        answer, _ = self.ask("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%S %i")
        running = [tuple(line.split()) for line in answer.splitlines()]
        trained = sorted(each for each in running if len(each) == 2 and each[1] in noted)
        return trained[0][1] if trained and trained[0][1] != self.job else ""

    def preflight(self):
        """The exit code of the preflight, 0 without one."""
        if not self.options.preflight:
            return DONE, {}, False
        report = os.path.join(self.options.folder, "preflight.json")
        if os.path.exists(report):
            os.remove(report)
        code, failures, outage = self.srun(self.options.preflight, self.options.preflight_seconds)
        if code != BAD_NODE:
            return code, failures, outage
        try:
            with open(report, encoding="utf-8") as file:
                named = json.load(file)["bad_nodes"]
        except (OSError, ValueError):
            return CRASHED, {}, outage  # the disk did not take it
        return code, {node: "; ".join(reasons) for node, reasons in named.items()}, outage

    def decide(self, code, number):
        """The exit code of the job, or None for another try here; does not return from a requeue."""
        if code == DONE and self.signalled is None:
            return DONE
        if code in FINAL:
            return self.stop(code, "the same again would fail again; the lines above say why")
        fruitless = fruitless_tries(self.events, self.checkpoint())
        if fruitless >= self.options.tries:
            return self.stop(code, f"{fruitless} tries in a row brought no new checkpoint")
        stays = tries_in_vain(self.events, self.checkpoint())
        if stays >= max(IN_VAIN, self.options.tries):
            reason = f"{stays} tries in a row ended before they could save a step; give a longer --time, or a smaller"
            return self.stop(code if code != DONE else FAILED, f"{reason} signal_seconds in the site file")
        excluded = self.nodes_to_avoid()
        if self.signalled is not None:
            return self.requeue(code, f"stopped by {self.signalled}", excluded)
        if code == STOPPED:
            return self.requeue(code, "a signal reached the ranks", excluded)
        lost = [node for node in self.nodes() if LOST_NODE_STATES.search(self.shown("node", node, "State"))]
        if lost or set(excluded) & set(self.nodes()):
            return self.requeue(code, f"{','.join(lost or excluded)} failed", excluded)
        # Longer and longer: what ails a machine or a file system may pass.
        pause = self.options.pause * 2 ** max(0, fruitless - 1)
        self.say(f"try {number} ended with code {code}; trying again here in {pause:g} s")
        time.sleep(pause)
        return None if self.signalled is None else self.requeue(code, f"stopped by {self.signalled}", excluded)

    def nodes_to_avoid(self):
        """Nodes that the preflight named, that took no tasks or gave no answer, or where tries failed twice.

        None where none are left.
        """
        ends = [event for event in self.events if event["event"] == "end"]
        failures = [(end["code"], node, how) for end in ends for node, how in end["failures"].items()]
        at_once = {node for code, node, how in failures if code == BAD_NODE or how.startswith(NOT_STARTED)}
        nodes = [node for _, node, _ in failures]
        avoided = sorted(at_once | {node for node in nodes if nodes.count(node) > 1})
        if not avoided:
            return []
        others = set(self.usable_nodes(os.environ.get("SLURM_JOB_PARTITION", ""))) - set(avoided)
        if len(others) < len(self.nodes()) or not self.could_run_without(avoided):
            self.say(f"{','.join(avoided)} failed, but no {len(self.nodes())} other nodes do for this job")
            return []
        return avoided

    def requeue(self, code, reason, excluded):
        """Gives the nodes back and waits to be ended; the job begins again when its turn comes."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the requeue ends this process: not before the last line
        if self.shown("job", self.job, "JobState") == "COMPLETING":
            # Cancelled, or requeued by Slurm itself: a requeue of ours would bring a cancelled job back, and an exit
            # code would be taken for that of a job which waits again.
            self.say("Slurm ends this job")
            time.sleep(3600)
        self.write("requeue", reason=reason, excluded=excluded)
        self.say(f"{reason}: back to the queue" + (", without " + ",".join(excluded) if excluded else ""))
        _, failure = self.ask("scontrol", "requeue", self.job)
        # The answer to a first request may have been lost, though it was granted.
        if failure and self.shown("job", self.job, "JobState") not in ("COMPLETING", "PENDING"):
            return self.stop(code if code != DONE else FAILED, f"Slurm does not requeue this job ({failure})")
        if excluded:
            # Only a pending job takes this; it is pending from now on, and this process lives for Slurm's KillWait.
            names = self.with_the_users(excluded)
            _, failure = self.ask("scontrol", "update", "JobId=" + self.job, "ExcNodeList=" + names)
            if failure:
                self.say(f"the nodes could not be excluded ({failure}); the next try sees them again")
        time.sleep(3600)
        return self.stop(code, "Slurm did not end the requeued job")

    def could_run_without(self, nodes):
        """Whether Slurm has other nodes with all that the script asks for: a job without any waits for ever."""
        script = os.path.join(self.options.folder, "job.sbatch")
        _, failure = self.ask("sbatch", "--test-only", "--exclude=" + self.with_the_users(nodes), script)
        return not failure

    def with_the_users(self, nodes):
        """These nodes, and those that the job leaves out already: what is said anew replaces them."""
        names = self.shown("job", self.job, "ExcNodeList")
        return ",".join(sorted({*nodes, *(host_names(names) if names not in ("", "(null)") else [])}))

    def stop(self, code, reason):
        """The job is over."""
        self.write("stop", code=code, reason=reason)
        self.say(f"the job ends with code {code}: {reason}")
        return code

    # ---- what it looks at --------------------------------------------------------------------------------------------

    def srun(self, command, seconds=None):
        """Runs a step.

        Returns:
            Its decisive exit code, on which nodes tasks failed in what way, and whether it missed the controller.
        """
        ends: list[tuple[str, int, str]] = []
        reports: dict[int, set[int]] = {}
        troubles: list[str] = []
        self.step = subprocess.Popen(shlex.split(command), stderr=subprocess.PIPE)
        if self.signalled is not None:  # it came while srun was on its way
            self.step.send_signal(signal.SIGUSR1)
        pump = threading.Thread(target=pass_on, args=(self.step.stderr, ends, reports, troubles), daemon=True)
        pump.start()
        try:
            code = self.step.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.say(f"the step took longer than {seconds:g} s")
            self.step.terminate()
            code = self.step.wait()
        pump.join(10)
        nodes, silent = self.nodes(), silent_nodes(reports)
        # Those who waited for a silent node are not to blame.
        failures = {nodes[number]: NOT_STARTED + "no answer" for number in silent}
        for names, each, how in ends:
            if not silent and each not in (DONE, RANK_LOST, STOPPED, *FINAL):
                failures.update(dict.fromkeys(host_names(names), how))
        codes = [each for _, each, _ in ends if each != LAUNCH_FAILED]
        if code in FINAL and code not in codes and (troubles or len(ends) > len(codes)):
            code = CRASHED  # of srun itself, which says nothing of the program
        outage = any(OUTAGE.search(trouble) for trouble in troubles)
        return decisive([*codes, code if code >= 0 else 128 - code]), failures, outage

    def checkpoint(self):
        """Step of the newest complete checkpoint, -1 without one."""
        found = glob.glob(os.path.join(self.options.run_folder, "checkpoints", "step_*", "state.json"))
        steps = [os.path.basename(os.path.dirname(path))[len("step_") :] for path in found]
        return max([int(step) for step in steps if step.isdigit()] or [-1])

    def nodes(self):
        return host_names(os.environ["SLURM_JOB_NODELIST"])

    def write(self, event, **values):
        entry = dict(values, event=event, time=time.time(), job=self.job)
        self.events.append(entry)
        failure = append(self.path, json.dumps(entry))
        if failure:
            self.say(f"{self.path}: {failure}; the job goes on without a record of its {event!r}")

    def say(self, text):
        log(f"cola: {text}\n".encode())

    # ---- what it asks Slurm ------------------------------------------------------------------------------------------

    def ask(self, *command):
        """What one of Slurm's commands printed, and what went wrong in one line, or nothing.

        A controller that does not answer is asked again: it comes back, and the job holds its nodes meanwhile.
        """
        until = None
        while True:
            # Of this job's environment sbatch would make options.
            own = {
                name: value for name, value in os.environ.items() if not re.match("SLURM_(?!CONF|JWT)|SBATCH_", name)
            }
            process = subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            output, errors = (said.decode("utf-8", "replace") for said in process.communicate())
            failure = (" ".join(errors.split()) or f"exit code {process.returncode}") if process.returncode else ""
            if not OUTAGE.search(failure) or (until is not None and time.time() > until):
                return output, failure
            if until is None:
                until = time.time() + self.options.patience
                self.say(f"Slurm does not answer ({failure}); asking again for {self.options.patience:g} s")
            time.sleep(ASK_AGAIN_SECONDS)

    def shown(self, kind, name, key):
        """A value that scontrol shows of a job or a node."""
        answer, _ = self.ask("scontrol", "--oneliner", "show", kind, name)
        found = re.search(r"\b" + key + r"=(\S+)", answer)
        return found.group(1) if found else ""

    def usable_nodes(self, partition):
        """The nodes of a partition that are up."""
        command = ["sinfo", "--noheader", "--Node", "--format=%N", "--states=idle,alloc,mix,comp"]
        answer, _ = self.ask(*command, *(["--partition=" + partition] if partition else []))
        return answer.split()


def resolves(name):
    """Whether a name has an address here; a name server that is busy is asked again."""
    for _ in range(6):
        try:
            return bool(socket.getaddrinfo(name, None))
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN:
                return False
        time.sleep(ASK_AGAIN_SECONDS)
    return False


def own_id(environment):
    """The id that means this job alone: one element of an array has the array's, which means all of them."""
    if "SLURM_ARRAY_JOB_ID" not in environment:
        return environment["SLURM_JOB_ID"]
    return environment["SLURM_ARRAY_JOB_ID"] + "_" + environment["SLURM_ARRAY_TASK_ID"]


def fruitless_tries(events, checkpoint):
    """How many of the last tries brought no new checkpoint, though nobody told them to stop and Slurm was there.

    A try without an end was killed together with the supervisor: its node failed.
    """
    tries = []
    for event in events:
        if event["event"] == "try":
            tries.append({"from": event["checkpoint"], "asked": False})
        elif event["event"] == "end" and tries:  # a full disk may not have taken its beginning
            tries[-1]["asked"] = event["code"] == STOPPED or event["signal"] is not None or event.get("outage", False)
    count = 0
    for each in reversed(tries):
        if checkpoint > each["from"] or each["asked"]:
            break
        count, checkpoint = count + 1, each["from"]
    return count


def tries_in_vain(events, checkpoint):
    """How many of the last tries brought no new checkpoint, whatever ended them."""
    began = [event["checkpoint"] for event in events if event["event"] == "try"]
    return len(list(itertools.takewhile(lambda start: start >= checkpoint, reversed(began))))


def decisive(codes):
    """Of the exit codes of all tasks the one that says what to do: what is final, then why, then who merely noticed."""
    for code in (*FINAL, BAD_NODE):
        if code in codes:
            return code
    others = [code for code in codes if code not in (DONE, RANK_LOST, STOPPED)]
    if others:
        return max(others)
    return next((code for code in (STOPPED, RANK_LOST) if code in codes), DONE)


def silent_nodes(reports):
    """Numbers of the nodes to blame, of {node: those it waited for in vain}.

    All meet at the first node, which waits for all; the others know of nothing but it. It is to blame where it says
    nothing itself, or where several others miss it: else the way between two nodes is broken at the other end.
    """
    if 0 not in reports or sum(0 in silent for silent in reports.values()) > 1:
        return sorted(set().union(*reports.values()) & {0})
    return sorted(reports[0])


def pass_on(stream, ends, reports, troubles):
    """Copies what a step says to our stderr, and notes what failed by itself.

    Args:
        ends: takes (nodes, exit code, how) of failed tasks.
        reports: takes for a node those that it had no answer from.
        troubles: takes the lines in which srun speaks of itself.
    """
    aftermath = False
    for line in iter(stream.readline, b""):
        log(line)
        text = line.decode("utf-8", "replace")
        missed = NO_ANSWER.match(text)
        if missed:
            reports[int(missed.group("node"))] = {int(number) for number in missed.group("silent").split(",")}
        aftermath = aftermath or AFTERMATH.match(text) is not None
        if aftermath:
            continue
        ended, unlaunched = TASK_END.match(text), LAUNCH_FAILURE.match(text)
        if ended:
            code = EXIT_CODE.search(ended.group("how"))
            ends.append((ended.group("nodes"), int(code.group("code")) if code else KILLED, ended.group("how")))
        elif unlaunched:
            ends.append((unlaunched.group("node"), LAUNCH_FAILED, NOT_STARTED + unlaunched.group("how")))
        elif TROUBLE.match(text):
            troubles.append(text)


def host_names(nodes):
    """n[1-2] -> [n1, n2]."""
    answer = subprocess.Popen(["scontrol", "show", "hostnames", nodes], stdout=subprocess.PIPE).communicate()[0]
    return answer.decode().split() or [nodes]


def read_events(path):
    """What stands in events.jsonl, without the lines that a kill, a full disk or a power cut left torn."""
    events = []
    for line in lines(path):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def lines(path):
    """The lines of a file; none where it is missing."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [line.strip() for line in file]


def append(path, line):
    """Adds a line to a file, for good; returns what went wrong, or nothing."""
    try:
        with open(path, "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line  # the last one may be torn
            file.write(line.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return ""


def log(line):
    """To the log of the job; a full disk does not take it, and does not end the job."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", required=True, help="folder of this submission")
    parser.add_argument("--run-folder", required=True, help="folder of the run, which has its checkpoints")
    parser.add_argument("--train", required=True, help="the srun command of a try")
    parser.add_argument("--preflight", default="", help="the srun command before it")
    parser.add_argument("--preflight-seconds", type=float, default=300, help="time that the preflight has")
    parser.add_argument("--tries", type=int, default=3, help="tries in a row without a new checkpoint")
    parser.add_argument("--pause", type=float, default=10, help="seconds before another try on the same nodes")
    parser.add_argument("--first-port", type=int, default=20000, help="of those that the processes meet on")
    parser.add_argument("--patience", type=float, default=3600, help="seconds that Slurm's controller may be away")
    return Supervisor(parser.parse_args()).run()


if __name__ == "__main__":
    sys.exit(main())
