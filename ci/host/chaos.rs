//! Consumers that are killed, stopped, or write nonsense, and servers that are killed, at random moments, while others go on.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dmaflow::endpoint::{Ready, Source};
use dmaflow::error::Kind;
use dmaflow::memory::{Access, Mapping};
use dmaflow::share::Receiver;
use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, send, socket,
};
use nix::unistd::Pid;
use serde_json::Value;

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
    /// Of the random numbers.
    pub seed: u64,
}

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

/// Consumers at once, besides the one that watches.
const VICTIMS: u64 = 4;

/// So much more memory than after some rounds may a process have in the end, in KiB: the kernel counts pages for each CPU by itself, and
/// tells of them when there are 32 (`percpu_counter_batch`, `get_mm_counter`), and the allocator keeps some for fragmentation.
pub const MORE_KIB: u64 = 256;

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

    fn connect(&self) -> Result<Receiver> {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            match Receiver::connect(&self.at, "watcher") {
                Err(error) if error.kind() == Kind::NotFound && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(20));
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
        let random = &mut Random(self.seed);
        let server = self.serve()?;
        let pid = server.pid();
        let mut watcher = Watcher::new(self.connect()?);
        // What a server takes once, it has when frames have come: what it has with one consumer is what it is to have in the end.
        watcher.watch_until("frames", |watcher| Ok(watcher.frames >= 5))?;
        let alone = Held::of(pid)?;
        let mut victims: Vec<Option<(Process, Option<Instant>)>> = Vec::new();
        for _ in 0..VICTIMS {
            victims.push(Some((self.consume("")?, None)));
        }
        nonsense(&self.at, random)?;
        watcher.watch(Duration::from_secs(1))?;
        let mut before = None;
        for round in 0..self.rounds {
            if round == self.rounds / 4 {
                before = Some(memory(pid)?);
            }
            watcher.watch(random.millis(10, 150))?;
            for (victim, again) in victims.iter().flatten() {
                if again.is_some_and(|again| again <= Instant::now()) {
                    victim.signal(Signal::SIGCONT)?;
                }
            }
            let which = random.below(VICTIMS) as usize;
            match random.below(4) {
                0 => victims[which] = Some((self.consume("")?, None)),
                1 => {
                    if let Some((victim, again)) = &mut victims[which] {
                        victim.signal(Signal::SIGSTOP)?;
                        *again = Some(Instant::now() + random.millis(50, 2000));
                    }
                }
                2 => nonsense(&self.at, random)?,
                _ => drop(raw(&self.at)?),
            }
        }
        victims.clear();
        let mut held = Held::of(pid)?;
        watcher
            .watch_until("the victims' things to be given back", |_| {
                held = Held::of(pid)?;
                Ok(held == alone)
            })
            .with_context(|| format!("the server has {held:?}, and had {alone:?} with the watcher alone"))?;
        let (memory_before, memory_after) = (before.context("no round")?, memory(pid)?);
        let (longest, skipped) = (watcher.longest, watcher.receiver.skipped());
        let report = self.end(server)?;
        let count = |what: &str| report["frames"][what].as_u64().context("frames");
        let (captured, lost, starved) = (count("captured")?, count("dropped_by_camera")?, count("starved")?);
        let text = format!(
            "{} rounds (seed {}): {captured} frames, {lost} lost by the source, {starved} of them for want of a buffer, the watcher skipped {skipped}, {longest} in a row at most; \
             memory {memory_before} KiB, then {memory_after}; {held:?}",
            self.rounds, self.seed
        );
        let gone = report["gone"].as_array().context("who has gone")?;
        ensure!(starved == 0 && lost * 100 <= captured * self.late && report["bytes_copied"] == 0, "{text}: {report}");
        ensure!(gone.iter().any(|gone| gone["disconnected"] == true), "{text}: nobody was disconnected: {report}");
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
        let random = &mut Random(self.seed);
        let mut server = self.serve()?;
        let mut watcher = Watcher::new(self.connect()?);
        watcher.receiver.come_back_to_it()?;
        let consumer = self.consume("--reconnect")?;
        let pid = consumer.pid();
        let buffers = watcher.receiver.buffers().len();
        watcher.watch_until("the other consumer", |_| Ok(shared_memory(pid)? > buffers))?;
        let joined = Held::of(pid)?;
        let (mut before, mut came) = (None, 0);
        for round in 0..self.rounds {
            if round == self.rounds / 4 {
                before = Some(memory(pid)?);
            }
            // Now and then while frames are held, now and then while consumers are just coming back.
            watcher.watch(random.millis(1, 300))?;
            drop(server);
            watcher.watch(random.millis(0, 120))?;
            server = self.serve()?;
            let end = Instant::now() + Duration::from_secs(60);
            let seen = watcher.frames;
            while round % 4 != 1 && watcher.frames < seen + 3 {
                watcher.watch(Duration::from_millis(20))?;
                ensure!(Instant::now() < end, "round {round} (seed {}): the watcher did not come back", self.seed);
            }
            came += u32::from(watcher.frames > seen);
        }
        // The other one as well.
        let mut held = Held::of(pid)?;
        watcher
            .watch_until("the other consumer", |_| {
                held = Held::of(pid)?;
                Ok(held == joined)
            })
            .with_context(|| format!("the consumer has {held:?}, and had {joined:?} at first"))?;
        let (memory_before, memory_after) = (before.context("no round")?, memory(pid)?);
        let report = self.end(server)?;
        let names: Vec<_> = report["consumers"]
            .as_array()
            .context("consumers")?
            .iter()
            .map(|it| &it["name"])
            .collect();
        ensure!(names.contains(&&"dmaflow".into()) && names.contains(&&"watcher".into()), "{report}");
        let text = format!(
            "{} rounds (seed {}): {came} times there again at once; of a consumer memory {memory_before} KiB, then {memory_after}; {held:?}",
            self.rounds, self.seed
        );
        ensure!(memory_after <= memory_before + MORE_KIB, "{text}");
        Ok(text)
    }

    fn end(&self, mut server: Process) -> Result<Value> {
        server.signal(Signal::SIGINT)?;
        let mut stdout = String::new();
        let out = server.0.stdout.as_mut().context("its output is not caught")?;
        std::io::Read::read_to_string(out, &mut stdout)?;
        let status = server.0.wait()?;
        ensure!(status.success(), "the server: {status}");
        Ok(serde_json::from_str(&stdout)?)
    }
}

/// One that does as it should, and sees what becomes of it.
struct Watcher {
    receiver: Receiver,
    frames: u64,
    skipped: u64,
    /// Frames in a row that it did not get.
    longest: u64,
}

impl Watcher {
    fn new(receiver: Receiver) -> Watcher {
        let skipped = receiver.skipped();
        Watcher { receiver, frames: 0, skipped, longest: 0 }
    }

    /// Watches until something is so.
    fn watch_until(&mut self, what: &str, mut is: impl FnMut(&Watcher) -> Result<bool>) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !is(self)? {
            ensure!(Instant::now() < end, "it waits for {what} for ever");
            self.watch(Duration::from_millis(20))?;
        }
        Ok(())
    }

    fn watch(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            match self.receiver.try_next(Ready::FRAME) {
                Ok(Some(frame)) => {
                    ensure!(self.receiver.holds(&frame), "a frame was taken back at once: {:?}", frame.meta());
                    self.frames += 1;
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

/// Resident memory that is the process's own, in KiB.
pub fn memory(pid: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .context("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// What a process has of the kernel's, besides memory of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// Open descriptors.
    pub fds: usize,
    /// Rings and buffers that are mapped: memory that is not the process's own, so [`memory`] does not tell of it.
    pub mappings: usize,
}

impl Held {
    pub fn of(pid: Pid) -> Result<Held> {
        let fds = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        Ok(Held { fds, mappings: maps.lines().filter(|line| is_shared(line)).count() })
    }
}

/// Whether a name in /proc is that of memory which processes share: of a ring, or of a buffer.
fn is_shared(name: &str) -> bool {
    name.contains("/memfd:") || name.contains("/dmabuf:")
}

/// So many buffers has a process open, and rings mapped.
fn shared_memory(pid: Pid) -> Result<usize> {
    let mut count = fs::read_to_string(format!("/proc/{pid}/maps"))?
        .lines()
        .filter(|line| line.contains("/memfd:dmaflow-ring"))
        .count();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One that is closed meanwhile is none.
        let name = fs::read_link(entry?.path()).unwrap_or_default();
        count += usize::from(is_shared(&name.to_string_lossy()));
    }
    Ok(count)
}

/// A connection that has said hello, by the protocol's documentation, and what came with the welcome.
fn raw(at: &str) -> Result<(OwnedFd, Vec<OwnedFd>)> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(at)?)?;
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
        std::thread::sleep(random.millis(0, 8));
    }
    if random.below(2) == 0 {
        let len = 1 + random.below(600) as usize;
        // Its server has hung up perhaps.
        let _ = send(fd.as_raw_fd(), &random.bytes(len), MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
    }
    Ok(())
}
