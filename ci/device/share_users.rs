//! One camera for the processes of other users: who may connect, and what who may can do to the buffers.

use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::Output;
use std::ptr::NonNull;

use anyhow::{Context, Result, bail, ensure};
use dmaflow::endpoint::Source;
use dmaflow::error::Kind;
use dmaflow::frame::Frame;
use dmaflow::memory::page_size;
use dmaflow::share::Receiver;
use dmaflow::sink::frame_to_rgb;
use nix::errno::Errno;
use nix::libc::c_void;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mprotect, munmap};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;

use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::{as_nobody, vivid};
use crate::process::{dmaflow, start};
use crate::share::{connect, next};
use crate::share_many::CONSUMER;
use crate::shared::sum;
use crate::sinks::has_bars;

const ALLOWED: &str = "share::an_allowed_user_reads";

pub const TESTS: &[Test] = &[
    Test { name: "share::other_users", needs: &["vivid"], seconds: 120, run: other_users },
    Test { name: ALLOWED, needs: &["vivid"], seconds: 180, run: an_allowed_user_reads },
];

/// The user of [`as_nobody`].
const NOBODY: u32 = 65534;

/// Nobody else may use the camera, unless the server says so.
fn other_users() -> Result<Outcome> {
    let (path, name) = ("/tmp/dmaflow-share-users.sock", "@dmaflow-share-users");
    let program = dmaflow("").get_program().to_string_lossy().into_owned();
    for (at, options, allowed) in [
        (path, "", false),
        (path, " --mode 660", false),
        (path, " --mode 666", true),
        // Those who are named are meant.
        (path, " --mode 666 --allow-uid 1000", false),
        (path, " --group 65534", true),
        (path, " --group 65534 --mode 600", false),
        (path, " --allow-uid 65534", true),
        (path, " --allow-gid 65534", true),
        // A name has no file whose mode would keep anybody away: the server alone does.
        (name, "", false),
        (name, " --allow-uid 1000", false),
        (name, " --allow-uid 65534", true),
    ] {
        let server = start(&mut dmaflow(&format!("share --from vivid --at {at} --json{options}")))?;
        drop(connect(at)?);
        let run = as_nobody(&format!("exec {program} pipe --from unix:{at} --to null --frames 3 --json")).output()?;
        let (stdout, stderr) = said(&run);
        let status = if allowed { 0 } else { 1 };
        ensure!(run.status.code() == Some(status), "{at}{options}: {:?}: {stderr}", run.status);
        ensure!(allowed || stderr.contains("allow-uid"), "{at}{options}: {stderr}");
        ensure!(!allowed || stdout.contains("\"captured\":3"), "{at}{options}: {stdout}");
        server.signal(Signal::SIGINT)?;
        let result = server.end()?.json(0)?;
        let gone = result["gone"].as_array().context("who has gone")?;
        let mut frames = gone
            .iter()
            .filter(|gone| gone["uid"] == NOBODY)
            .map(|gone| gone["frames"].as_u64());
        ensure!(frames.clone().next().is_some() == allowed, "{at}{options}: {result}");
        ensure!(frames.all(|frames| frames >= Some(3)), "{at}{options}: {result}");
    }
    PASSED
}

fn said(run: &Output) -> (String, String) {
    (String::from_utf8_lossy(&run.stdout).into_owned(), String::from_utf8_lossy(&run.stderr).into_owned())
}

/// Another user, once allowed, sees the pictures and can write to no memory but its own, whatever the format's planes lie in.
fn an_allowed_user_reads() -> Result<Outcome> {
    if let Ok(at) = std::env::var(CONSUMER) {
        return read(&at);
    }
    // Formats with a memory for each plane are offered by the API that has several.
    vivid(&["multiplanar=2"])?;
    for (at, format, memories) in [
        ("/tmp/dmaflow-share-allowed.sock", "XR24", 1),
        ("/tmp/dmaflow-share-allowed.sock", "NM12", 2),
        ("@dmaflow-share-allowed", "XR24", 1),
    ] {
        let line =
            format!("share --from vivid --format {format} --size 640x360 --fps 30 --at {at} --allow-uid {NOBODY}");
        let server = start(&mut dmaflow(&format!("{line} --lease 20000 --json")))?;
        let mut beside = connect(at)?;
        ensure!(beside.layout().memory_planes() == memories, "{:?}", beside.layout());
        let program = std::env::current_exe()?;
        let line = format!("exec {} --run-one {ALLOWED}", program.display());
        let run = as_nobody(&line).env(CONSUMER, at).output()?;
        let (stdout, stderr) = said(&run);
        ensure!(run.status.success(), "{at}, {format}: {:?}: {stderr}", run.status);
        note(&format!("{at}, {format}: {}", stdout.trim()));
        ensure!(stdout.contains(&format!("{memories} a buffer")), "{stdout}");
        // The others go on.
        ensure!(has_bars(&rgb(&next(&mut beside)?)?), "{at}, {format}: the picture is another");
        drop(beside);
        server.signal(Signal::SIGINT)?;
        server.end()?.json(0)?;
    }
    PASSED
}

fn rgb(frame: &Frame) -> Result<((u32, u32), Vec<u8>)> {
    let layout = frame.buffer().layout();
    Ok(((layout.width(), layout.height()), frame_to_rgb(frame)?))
}

/// The other user's process.
fn read(at: &str) -> Result<Outcome> {
    ensure!(geteuid().as_raw() == NOBODY, "it is user {}", geteuid());
    let error = Receiver::connect_writable(at, "writer")
        .err()
        .context("it got them for writing")?;
    ensure!(error.kind() == Kind::Permission && error.line().contains("--writable"), "{error:?}");
    let mut receiver = Receiver::connect(at, "allowed")?;
    let mut frames = 0;
    while frames < 5 {
        let frame = next(&mut receiver)?;
        ensure!(has_bars(&rgb(&frame)?), "frame {frames}, {}, is another picture", frame.buffer().layout());
        frames += 1;
    }
    // Every buffer, and not only that of a frame: all are known from the start.
    let mut memories = Vec::new();
    for buffer in receiver.buffers() {
        for (memory, &len) in buffer.memory_lens().iter().enumerate() {
            let dma_buf = buffer.dma_buf(memory.try_into()?).context("a dma-buf")?;
            cannot_write(dma_buf.as_fd(), len).with_context(|| format!("memory {memory}"))?;
            memories.push(memory);
        }
    }
    let each = memories.iter().max().context("no memory")? + 1;
    // What it writes into private pages it alone sees, mapped by the library or by itself.
    let frame = next(&mut receiver)?;
    let shown = sum(&frame)?;
    let mut view = frame.view("allowed")?;
    ensure!(view.write(0, 0, 0, &[0xa5; 4])? == 4 && view.copied_pages()? == 1, "the view cannot be written");
    for (memory, &len) in frame.buffer().memory_lens().iter().enumerate() {
        let dma_buf = frame.buffer().dma_buf(memory.try_into()?).context("a dma-buf")?;
        let private = Mapped::new(dma_buf.as_fd(), len, READ_WRITE, MapFlags::MAP_PRIVATE)?;
        private.scribble();
    }
    ensure!(sum(&frame)? == shown, "others see what was written into private pages");
    ensure!(receiver.holds(&frame), "the frame was taken back meanwhile");
    note(&format!("{frames} frames seen; none of {} dma-bufs, {each} a buffer, can be written", memories.len()));
    PASSED
}

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// No way leads from this descriptor to memory that could be written and is others' as well.
fn cannot_write(fd: BorrowedFd<'_>, len: usize) -> Result<()> {
    for protection in [READ_WRITE, ProtFlags::PROT_WRITE] {
        let errno = Mapped::new(fd, len, protection, MapFlags::MAP_SHARED).err();
        ensure!(errno == Some(Errno::EACCES), "a shared mapping with {protection:?}: {errno:?}");
    }
    let shared = Mapped::new(fd, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED).context("a mapping for reading")?;
    let errno = shared.protect(READ_WRITE).err();
    ensure!(errno == Some(Errno::EACCES), "a mapping that is made writable: {errno:?}");
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    for read in [true, false] {
        match fs::File::options().read(read).write(true).open(&path) {
            Ok(_) => bail!("{path} was opened for writing"),
            // The dma-buf's inode is its maker's alone (alloc_anon_inode in fs/libfs.c), who is another user.
            Err(error) => ensure!(error.kind() == io::ErrorKind::PermissionDenied, "{path}: {error}"),
        }
    }
    Ok(())
}

/// A mapping of any kind, as a program makes it that does not use the library.
struct Mapped {
    start: NonNull<c_void>,
    len: NonZeroUsize,
}

impl Mapped {
    fn new(fd: BorrowedFd<'_>, len: usize, protection: ProtFlags, kind: MapFlags) -> nix::Result<Mapped> {
        let len = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        // SAFETY: a new mapping at an address that the kernel chooses takes nothing away from anybody.
        let start = unsafe { mmap(None, len, protection, kind, fd, 0) }?;
        Ok(Mapped { start, len })
    }

    fn protect(&self, protection: ProtFlags) -> nix::Result<()> {
        // SAFETY: of this mapping alone, which nothing refers to.
        unsafe { mprotect(self.start, self.len.get(), protection) }
    }

    /// Writes into each page of a mapping that can be written.
    fn scribble(&self) {
        for at in (0..self.len.get()).step_by(page_size()) {
            // SAFETY: within the mapping, which its user has mapped for writing, and to which nothing else refers.
            unsafe { self.start.cast::<u8>().add(at).write_volatile(0xa5) };
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and unmapped nowhere else.
        let _ = unsafe { munmap(self.start, self.len.get()) };
    }
}
