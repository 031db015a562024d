//! Consumers that are killed, stopped, or write nonsense, and servers that are killed, at random moments, while others go on.

// By its path: ci/device has this file as a part of itself.
#[path = "chaos/held.rs"]
mod held;

use std::env;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use dmaflow::endpoint::{Ready, Source};
use dmaflow::error::Kind;
use dmaflow::memory::{Access, Mapping};
use dmaflow::share::Receiver;
use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;
use serde_json::Value;

pub use held::{Held, memory};
use held::{is_one_of, rings, shared_fds};

/// What happens, and with what.
pub struct Chaos {
    /// The command.
    pub program: PathBuf,
    /// What is shared: the options of `share`.
    pub source: String,
    /// Where.
    pub at: String,
    pub rounds: u32,
    /// Of a hundred frames so many may be lost: by a source that keeps time by the clock and comes too late itself where the host stalls.
    pub late: u64,
    /// Of the random numbers, if `DMAFLOW_SEED` names no other: what a failure names, so that it can be tried again.
    pub seed: u64,
}

/// A thread that does something at a server that it should not.
type Intruder = JoinHandle<Result<()>>;

/// A process that is killed with its test.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(self.pid(), signal)?)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id().cast_signed())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A consumer to whom things happen.
struct Victim {
    process: Process,
    /// Whether it keeps frames all the time, and has them when it is stopped or killed.
    keeps: bool,
    /// When it goes on, if it is stopped.
    again: Option<Instant>,
    /// Whether it is not to be bothered before that.
    whole: bool,
}

impl Victim {
    fn stop(&mut self, time: Duration) -> Result<()> {
        self.process.signal(Signal::SIGSTOP)?;
        self.again = Some(Instant::now() + time);
        Ok(())
    }

    fn go_on(&mut self) -> Result<()> {
        self.process.signal(Signal::SIGCONT)?;
        (self.again, self.whole) = (None, false);
        Ok(())
    }

    /// Whether it has a view of a frame.
    fn has_views(&self) -> Result<bool> {
        let shared = Held::of(self.process.pid())?.mappings;
        Ok(shared > rings(self.process.pid())?.len())
    }
}

/// xorshift64 (Marsaglia): the same sequence for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// Bytes of a ring's area, by the protocol's documentation: three lines and 16 entries of 64 each.
const AREA: u64 = 64 * (3 + 16);

/// Consumers at once, besides the one that watches. Every other one keeps frames.
const VICTIMS: u64 = 4;

/// So long is one of those stopped once in each run.
const WHOLE_STOP: Duration = Duration::from_secs(2);

/// So much more memory than after some rounds may a process have in the end, in KiB: the kernel counts pages for each CPU by itself, and
/// tells of them when there are 32 (`percpu_counter_batch`, `get_mm_counter`), and the allocator keeps some for fragmentation.
pub const MORE_KIB: u64 = 256;

/// A process that has opened and closed nothing for so long has all that it works with: what it opens at its start comes in a row.
const STEADY: Duration = Duration::from_secs(2);

/// No process takes as long to do what it is waited for, be it emulated beside others.
const PATIENCE: Duration = Duration::from_secs(60);

impl Chaos {
    fn start(&self, line: &str) -> Result<Process> {
        let mut command = Command::new(&self.program);
        command.args(line.split_whitespace()).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        Ok(Process(
            command
                .spawn()
                .with_context(|| format!("cannot start {}", self.program.display()))?,
        ))
    }

    fn serve(&self) -> Result<Process> {
        self.start(&format!("share {} --at {} --json", self.source, self.at))
    }

    fn consume(&self, options: &str) -> Result<Process> {
        self.start(&format!("pipe --from unix:{} --to null {options}", self.at))
    }

    fn victim(&self, which: usize) -> Result<Victim> {
        let keeps = which % 2 == 1;
        let options = if keeps { "--keep-views 1 --view-policy wait" } else { "" };
        Ok(Victim { process: self.consume(options)?, keeps, again: None, whole: false })
    }

    /// Does something at its server from a thread of its own: who watches is not to be late for that.
    fn intrude(&self, seed: u64, how: impl FnOnce(&str, &mut Random) -> Result<()> + Send + 'static) -> Intruder {
        let at = self.at.clone();
        thread::spawn(move || how(&at, &mut Random(seed)))
    }

    fn seed(&self) -> Result<u64> {
        match env::var("DMAFLOW_SEED") {
            // With 0 all of its numbers were 0.
            Ok(seed) => Ok(seed.parse::<NonZeroU64>().context("DMAFLOW_SEED")?.get()),
            Err(_) => Ok(self.seed | 1),
        }
    }

    fn connect(&self) -> Result<Receiver> {
        let end = Instant::now() + PATIENCE;
        loop {
            match Receiver::connect(&self.at, "watcher") {
                Err(error) if error.kind() == Kind::NotFound && Instant::now() < end => {
                    thread::sleep(Duration::from_millis(20));
                }
                other => return Ok(other?),
            }
        }
    }

    /// Consumers are killed, stopped for as long as two seconds, and write random bytes into ring and socket.
    ///
    /// # Errors
    /// What did not hold: the camera dropped none, or as few as it may; who watches missed no more in a row than a lease; the server has
    /// as many descriptors, rings and buffers mapped as with the watcher alone, and as much memory as after a quarter of the rounds.
    pub fn of_consumers(&self) -> Result<String> {
        let seed = self.seed()?;
        self.consumers(seed).with_context(|| format!("DMAFLOW_SEED={seed}"))
    }

    fn consumers(&self, seed: u64) -> Result<String> {
        let random = &mut Random(seed);
        let server = self.serve()?;
        let pid = server.pid();
        let watcher = Watcher::new(self.connect()?);
        // What a server takes once, it has when frames have come: what it has with one consumer is what it is to have in the end.
        watcher.watch_until("frames", |watcher| Ok(watcher.frames() >= 5))?;
        let alone = Held::of(pid)?;
        let mut victims = (0..VICTIMS as usize)
            .map(|which| self.victim(which))
            .collect::<Result<Vec<_>>>()?;
        let mut intruders = vec![self.intrude(random.next(), nonsense)];
        let all_have_joined = |victims: &[Victim]| -> Result<bool> {
            let rings = rings(pid)?;
            let mut joined = victims.iter().map(|victim| is_one_of(victim.process.pid(), &rings));
            joined.try_fold(true, |all, one| Ok(all && one?))
        };
        watcher.watch_until("the victims", |_| all_have_joined(&victims))?;
        let (mut before, mut whole_stops) = (None, 0);
        for round in 0..self.rounds {
            if round == self.rounds / 4 {
                before = Some(memory(pid)?);
            }
            watcher.watch(random.millis(10, 150))?;
            whole_stops += wake(&mut victims)?;
            if round == self.rounds / 3 {
                let keeper = victims.iter_mut().find(|victim| victim.keeps).context("nobody keeps frames")?;
                keeper.go_on()?;
                watcher.watch_until("a view", |_| keeper.has_views())?;
                keeper.stop(WHOLE_STOP)?;
                keeper.whole = true;
            }
            let which = random.below(VICTIMS) as usize;
            match random.below(4) {
                0 | 1 if victims[which].whole => {}
                0 => victims[which] = self.victim(which)?,
                1 => victims[which].stop(random.millis(50, 2000))?,
                2 => intruders.push(self.intrude(random.next(), nonsense)),
                _ => intruders.push(self.intrude(random.next(), |at, _| raw(at).map(drop))),
            }
        }
        watcher.watch_until("those who are stopped", |_| {
            whole_stops += wake(&mut victims)?;
            Ok(victims.iter().all(|victim| victim.again.is_none()))
        })?;
        ensure!(whole_stops == 1, "{whole_stops} were stopped for {WHOLE_STOP:?}");
        // Those who keep frames have some when they are killed.
        watcher.watch_until("views", |_| {
            let mut keepers = victims.iter().filter(|victim| victim.keeps);
            keepers.try_fold(true, |all, keeper| Ok(all && keeper.has_views()?))
        })?;
        let keepers = victims.iter().filter(|victim| victim.keeps);
        let keepers: Vec<_> = keepers.map(|victim| victim.process.0.id()).collect();
        victims.clear();
        watcher.watch_until("the intruders", |_| Ok(intruders.iter().all(Intruder::is_finished)))?;
        for intruder in intruders {
            intruder.join().map_err(|_| anyhow!("an intruder panicked"))??;
        }
        let mut held = Held::of(pid)?;
        watcher
            .watch_until("the victims' things to be given back", |_| {
                held = Held::of(pid)?;
                Ok(held == alone)
            })
            .with_context(|| format!("the server has {held:?}, and had {alone:?} with the watcher alone"))?;
        let (memory_before, memory_after) = (before.context("no round")?, memory(pid)?);
        // It stays a consumer until the server has ended.
        let seen = watcher.end()?;
        let (longest, skipped) = (seen.longest, seen.skipped);
        let report = self.end(server)?;
        drop(seen);
        let count = |what: &str| report["frames"][what].as_u64().context("frames");
        let (captured, lost, starved) = (count("captured")?, count("dropped_by_camera")?, count("starved")?);
        let text = format!(
            "{} rounds (seed {seed}): {captured} frames, {lost} lost by the source, {starved} of them for want of a buffer, the watcher skipped {skipped}, {longest} in a row at most; \
             memory {memory_before} KiB, then {memory_after}; {held:?}",
            self.rounds
        );
        let gone = report["gone"].as_array().context("who has gone")?;
        ensure!(starved == 0 && lost * 100 <= captured * self.late && report["bytes_copied"] == 0, "{text}: {report}");
        ensure!(gone.iter().any(|gone| gone["disconnected"] == true), "{text}: nobody was disconnected: {report}");
        let kept = gone.iter().filter(|gone| keepers.iter().any(|&pid| gone["pid"] == pid));
        let kept: Vec<_> = kept.map(|gone| gone["leases"].as_u64()).collect();
        ensure!(
            kept.len() == keepers.len() && kept.iter().all(|kept| *kept > Some(0)),
            "{text}: {kept:?} were kept: {report}"
        );
        // The lease is three frame times.
        ensure!(longest <= 3, "{text}: {report}");
        ensure!(memory_after <= memory_before + MORE_KIB, "{text}");
        Ok(text)
    }

    /// Servers are killed and started again while consumers are to come back.
    ///
    /// # Errors
    /// What did not hold: each consumer comes back each time, and has as many descriptors, rings and buffers mapped as before, and as much
    /// memory as after a quarter of the rounds.
    pub fn of_servers(&self) -> Result<String> {
        let seed = self.seed()?;
        self.servers(seed).with_context(|| format!("DMAFLOW_SEED={seed}"))
    }

    fn servers(&self, seed: u64) -> Result<String> {
        let random = &mut Random(seed);
        let mut server = self.serve()?;
        let mut receiver = self.connect()?;
        receiver.come_back_to_it()?;
        let buffers = receiver.buffers().len();
        let watcher = Watcher::new(receiver);
        let consumer = self.consume("--reconnect")?;
        let pid = consumer.pid();
        // What it has when it has joined, and opened what it waits with: the buffers come before that.
        let (mut joined, mut since) = (Held::of(pid)?, Instant::now());
        watcher.watch_until("the other consumer", |_| {
            let held = Held::of(pid)?;
            if held != joined {
                (joined, since) = (held, Instant::now());
            }
            let is_joined = is_one_of(pid, &rings(server.pid())?)? && shared_fds(pid)? >= buffers;
            Ok(is_joined && since.elapsed() >= STEADY)
        })?;
        let (mut before, mut came, mut seen) = (None, 0, 0);
        for round in 0..self.rounds {
            if round == self.rounds / 4 {
                before = Some(memory(pid)?);
            }
            // Now and then while frames are held, now and then while consumers are just coming back.
            watcher.watch(random.millis(1, 300))?;
            drop(server);
            watcher.watch(random.millis(0, 120))?;
            server = self.serve()?;
            seen = watcher.frames();
            if round % 4 != 1 {
                let back = watcher.watch_until("the next server", |watcher| Ok(watcher.frames() >= seen + 3));
                back.with_context(|| format!("round {round}"))?;
            }
            came += u32::from(watcher.frames() > seen);
        }
        // Both are there again.
        watcher.watch_until("the last server", |watcher| Ok(watcher.frames() > seen))?;
        let mut held = Held::of(pid)?;
        watcher
            .watch_until("the other consumer", |_| {
                held = Held::of(pid)?;
                Ok(is_one_of(pid, &rings(server.pid())?)? && held == joined)
            })
            .with_context(|| format!("the consumer has {held:?}, and had {joined:?} at first"))?;
        let (memory_before, memory_after) = (before.context("no round")?, memory(pid)?);
        let seen = watcher.end()?;
        let report = self.end(server)?;
        drop(seen);
        let names: Vec<_> = report["consumers"]
            .as_array()
            .context("consumers")?
            .iter()
            .map(|it| &it["name"])
            .collect();
        ensure!(names.contains(&&"dmaflow".into()) && names.contains(&&"watcher".into()), "{report}");
        let text = format!(
            "{} rounds (seed {seed}): {came} times there again at once; of a consumer memory {memory_before} KiB, then {memory_after}; {held:?}",
            self.rounds
        );
        ensure!(memory_after <= memory_before + MORE_KIB, "{text}");
        Ok(text)
    }

    fn end(&self, mut server: Process) -> Result<Value> {
        server.signal(Signal::SIGINT)?;
        let end = Instant::now() + PATIENCE;
        // It says less than a pipe holds.
        while server.0.try_wait()?.is_none() {
            ensure!(Instant::now() < end, "the server does not end");
            thread::sleep(Duration::from_millis(10));
        }
        let mut stdout = String::new();
        let out = server.0.stdout.as_mut().context("its output is not caught")?;
        std::io::Read::read_to_string(out, &mut stdout)?;
        let status = server.0.wait()?;
        ensure!(status.success(), "the server: {status}");
        Ok(serde_json::from_str(&stdout)?)
    }
}

/// One that does as it should, and sees what becomes of it, in a thread of its own: what it misses is nothing that the test was late with.
struct Watcher {
    thread: JoinHandle<Result<Seen>>,
    frames: Arc<AtomicU64>,
    ends: Arc<AtomicBool>,
    /// Why it has ended before.
    why: Arc<OnceLock<String>>,
}

impl Watcher {
    fn new(receiver: Receiver) -> Watcher {
        let (frames, ends) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let skipped = receiver.skipped();
        let mut seen = Seen { receiver, frames: Arc::clone(&frames), skipped, longest: 0 };
        let (end, why) = (Arc::clone(&ends), Arc::new(OnceLock::new()));
        let tell = Arc::clone(&why);
        let thread = thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                seen.watch(Duration::from_millis(100))
                    .inspect_err(|error| drop(tell.set(format!("{error:?}"))))?;
            }
            Ok(seen)
        });
        Watcher { thread, frames, ends, why }
    }

    fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Waits while it watches.
    fn watch(&self, time: Duration) -> Result<()> {
        ensure!(!self.thread.is_finished(), "the watcher has ended: {:?}", self.why.get());
        thread::sleep(time);
        Ok(())
    }

    /// Waits until something is so.
    fn watch_until(&self, what: &str, mut is: impl FnMut(&Watcher) -> Result<bool>) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !is(self)? {
            ensure!(Instant::now() < end, "it waits for {what} for ever");
            self.watch(Duration::from_millis(20))?;
        }
        Ok(())
    }

    /// Has it end, and tells what it has seen.
    fn end(self) -> Result<Seen> {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the watcher panicked"))?
    }
}

/// What the watcher sees.
struct Seen {
    receiver: Receiver,
    frames: Arc<AtomicU64>,
    skipped: u64,
    /// Frames in a row that it did not get.
    longest: u64,
}

impl Seen {
    fn watch(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            match self.receiver.try_next(Ready::FRAME) {
                Ok(Some(frame)) => {
                    ensure!(self.receiver.holds(&frame), "a frame was taken back at once: {:?}", frame.meta());
                    self.frames.fetch_add(1, Ordering::Relaxed);
                    let skipped = self.receiver.skipped();
                    self.longest = self.longest.max(skipped.saturating_sub(self.skipped));
                    self.skipped = skipped;
                    continue;
                }
                Ok(None) => {}
                Err(error) if error.kind() == Kind::FormatChanged => {
                    self.receiver.follow()?;
                    continue;
                }
                Err(error) => bail!("the watcher: {error:?}"),
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let left = u16::try_from(left.as_millis()).unwrap_or(u16::MAX).max(1);
            poll(&mut [PollFd::new(self.receiver.as_fd(), PollFlags::POLLIN)], left)?;
        }
    }
}

/// Has those go on whose time has come, and tells how many of them were stopped for [`WHOLE_STOP`].
fn wake(victims: &mut [Victim]) -> Result<u32> {
    let mut whole = 0;
    for victim in victims.iter_mut() {
        if victim.again.is_some_and(|again| again <= Instant::now()) {
            whole += u32::from(victim.whole);
            victim.go_on()?;
        }
    }
    Ok(whole)
}

/// A connection that has said hello, by the protocol's documentation, and what came with the welcome.
fn raw(at: &str) -> Result<(OwnedFd, Vec<OwnedFd>)> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(at)?)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE.as_secs() as i64, 0))?;
    send(fd.as_raw_fd(), b"dmaf\x01\0\x01\0\0\0\0\0\x05\0chaos", MsgFlags::MSG_NOSIGNAL)?;
    let mut bytes = [0; 512];
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let mut space = cmsg_space!([i32; 3]);
    let message = recvmsg::<UnixAddr>(fd.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made them for this process, and nobody else owns them.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((fd, fds))
}

/// One that writes random bytes into its ring and its socket.
fn nonsense(at: &str, random: &mut Random) -> Result<()> {
    let (fd, fds) = raw(at)?;
    let Some(ring) = fds.first() else { bail!("there is no ring") };
    let mut ring = Mapping::new(ring.as_fd(), 4096, Access::ReadWrite)?;
    for _ in 0..1 + random.below(20) {
        let at = random.below(AREA);
        let len = 1 + random.below((AREA - at).min(64)) as usize;
        ring.write(at as usize, &random.bytes(len));
        thread::sleep(random.millis(0, 8));
    }
    if random.below(2) == 0 {
        let len = 1 + random.below(600) as usize;
        // Its server has hung up perhaps.
        let _ = send(fd.as_raw_fd(), &random.bytes(len), MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
    }
    Ok(())
}
