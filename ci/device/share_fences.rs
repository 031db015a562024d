//! Frames with fences by way of a share: those that they come with, and those that they are given back with.

use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dmaflow::endpoint::{Ready, Sink, Source};
use dmaflow::fence::SyncFile;
use dmaflow::frame::Frame;
use dmaflow::ladder::Path;
use dmaflow::pipe::{Limits, Pipe};
use dmaflow::share::{Receiver, Server, ServerRequest};
use dmaflow::v4l2::Camera;
use nix::libc;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};

use crate::fences_flow::{Fate, Fenced};
use crate::fences_shown::{NOT_YET, camera_with, signalled};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::process::{dmaflow, finish, number};
use crate::sw_sync::Timeline;
use crate::vgem::Vgem;

const NEEDS: &[&str] = &["vivid", "vgem", "udmabuf"];
const SHOWN: &[&str] = &["vivid", "vkms", "vgem", "udmabuf"];
const FAILING: &[&str] = &["vivid", "vgem", "sw_sync", "udmabuf"];

pub const TESTS: &[Test] = &[
    Test { name: "share_fences::acquired", needs: NEEDS, seconds: 120, run: acquired },
    Test { name: "share_fences::failed", needs: FAILING, seconds: 120, run: failed },
    Test { name: "share_fences::shown", needs: SHOWN, seconds: 240, run: shown },
    Test { name: "share_fences::released", needs: NEEDS, seconds: 120, run: released },
    Test { name: "share_fences::never_released", needs: FAILING, seconds: 180, run: never_released },
    Test { name: "share_fences::gone", needs: FAILING, seconds: 120, run: gone },
    Test { name: "share_fences::hostile", needs: NEEDS, seconds: 120, run: hostile },
    Test { name: "share_fences::both_ways", needs: NEEDS, seconds: 240, run: both_ways },
];

fn open_descriptors() -> Result<usize> {
    Ok(fs::read_dir("/proc/self/fd")?.count())
}

/// A camera, and its server in this process.
struct Shared {
    camera: Camera,
    server: Server,
    at: String,
}

impl Shared {
    fn new(buffers: u32, request: ServerRequest) -> Result<Shared> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let at = format!("@dmaflow-share-fences-{}-{number}", std::process::id());
        let mut camera = camera_with(buffers)?;
        camera.export_read_only()?;
        let mut server = Server::bind(&at, request)?;
        server.join(camera.layout(), camera.rate(), camera.buffers())?;
        camera.start()?;
        Ok(Shared { camera, server, at })
    }

    fn connect(&mut self) -> Result<Receiver> {
        let at = self.at.clone();
        let connecting = std::thread::spawn(move || Receiver::connect(&at, "test"));
        while !connecting.is_finished() {
            self.server.dispatch()?;
            sleep(Duration::from_millis(1));
        }
        Ok(connecting.join().expect("no panic")?)
    }

    /// The camera's next frame, while the server is heard, as by a pipe.
    fn next(&mut self) -> Result<Frame> {
        let end = Instant::now() + Duration::from_secs(30);
        while Instant::now() < end {
            self.camera.recycle()?;
            let fences = self.camera.release_fences();
            let server = self.server.event_fd().context("a server has a descriptor")?;
            let fds = [self.camera.as_fd(), server]
                .into_iter()
                .chain(fences.iter().map(|fence| fence.as_fd()));
            let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            poll(&mut fds, 1000u16)?;
            drop(fds);
            self.server.dispatch()?;
            if let Some(frame) = self.camera.try_next(Ready::FRAME)? {
                return Ok(frame);
            }
        }
        bail!("the camera starves: {}", self.camera.stalled().line())
    }

    /// The same, presented; the receiver's frame of it.
    fn give(&mut self, receiver: &mut Receiver) -> Result<Frame> {
        let frame = self.next()?;
        self.give_this(frame, receiver)
    }

    fn give_this(&mut self, frame: Frame, receiver: &mut Receiver) -> Result<Frame> {
        let sequence = frame.meta().sequence;
        self.server.present(frame)?;
        let got = receiver.try_next(Ready::FRAME)?.context("no frame came")?;
        ensure!(got.meta().sequence == sequence, "another came");
        Ok(got)
    }
}

fn row(frame: &Frame) -> dmaflow::Result<Vec<u8>> {
    let mut row = vec![0; frame.buffer().layout().width() as usize * 4];
    frame.read()?.row(0, 7, &mut row);
    Ok(row)
}

fn acquire_fence(frame: &Frame) -> Result<&SyncFile> {
    frame.acquire_fence().context("it came without its fence")
}

/// A consumer has a frame at once that a device still writes, and, when it has waited, what the device has written.
fn acquired() -> Result<Outcome> {
    let before = open_descriptors()?;
    let (vgem, mut shared) = (Vgem::open()?, Shared::new(6, ServerRequest::default())?);
    let (mut one, mut other) = (shared.connect()?, shared.connect()?);
    for round in 1..=3u8 {
        let (frame, (fence, signal)) = (shared.next()?, vgem.fence()?);
        let buffer = frame.buffer().clone();
        let writes = vec![round; buffer.layout().width() as usize * 4];
        let device: JoinHandle<Result<Vec<u8>>> = std::thread::spawn(move || {
            sleep(NOT_YET);
            buffer.write()?.row(0, 7, &writes);
            signal.now()?;
            Ok(writes)
        });
        let start = Instant::now();
        let got = shared.give_this(frame.with_acquire_fence(fence), &mut one)?;
        let also = other.try_next(Ready::FRAME)?.context("no frame came to the other")?;
        let early = [&got, &also].map(|frame| acquire_fence(frame).map(SyncFile::is_signalled));
        ensure!(start.elapsed() >= NOT_YET || early.into_iter().all(|early| early.is_ok_and(|early| !early)));
        let seen = [row(&got)?, row(&also)?];
        let written = device.join().expect("no panic")?;
        ensure!(seen.iter().all(|seen| *seen == written), "round {round}: not what was written");
        ensure!(start.elapsed() >= NOT_YET && acquire_fence(&got)?.check()?, "it has not waited");
        // The frame after has no fence, for those who have just waited.
        drop((got, also));
        let plain = shared.give(&mut one)?;
        ensure!(plain.acquire_fence().is_none() && other.try_next(Ready::FRAME)?.is_some());
    }
    // One that is dropped before is given back at once, and not filled before.
    let (frame, (fence, signal)) = (shared.next()?, vgem.fence()?);
    let slot = frame.slot();
    drop(shared.give_this(frame.with_acquire_fence(fence), &mut one)?);
    drop(other.try_next(Ready::FRAME)?);
    one.recycle()?;
    other.recycle()?;
    ensure!(one.release_fences().is_empty() && other.release_fences().is_empty(), "a frame was kept for its writer");
    drop(shared.give(&mut one)?);
    ensure!(
        (0..24).all(|_| shared.next().is_ok_and(|frame| frame.slot() != slot)),
        "it was filled while it is written"
    );
    ensure!(shared.camera.release_fences().len() == 1, "{:?}", shared.camera.release_fences());
    signal.now()?;
    ensure!((0..24).any(|_| shared.next().is_ok_and(|frame| frame.slot() == slot)), "slot {slot} was lost");
    ensure!(one.revoked() + other.revoked() + one.skipped() + other.skipped() == 0, "frames were lost");
    drop((one, other, shared, vgem));
    ensure!(open_descriptors()? == before, "{} descriptors instead of {before}", open_descriptors()?);
    PASSED
}

/// Work that fails is told to who waits for it, and costs that frame alone; one that has failed before is not published.
fn failed() -> Result<Outcome> {
    let mut shared = Shared::new(6, ServerRequest::default())?;
    let mut receiver = shared.connect()?;
    let timeline = Timeline::open()?;
    let frame = shared.next()?.with_acquire_fence(timeline.fence(1)?);
    let got = shared.give_this(frame, &mut receiver)?;
    let failing = timeline.fail_after(NOT_YET);
    let start = Instant::now();
    let error = row(&got).err().context("a picture that is not there was read")?;
    ensure!(start.elapsed() >= NOT_YET && error.is_of_fence() && error.errno() == Some(libc::ENOENT), "{error:?}");
    signalled(failing)?;
    drop(got);
    let timeline = Timeline::open()?;
    let frame = shared.next()?.with_acquire_fence(timeline.fence(1)?);
    timeline.fail();
    let error = shared
        .server
        .present(frame)
        .err()
        .context("a picture that is not there was shared")?;
    ensure!(error.is_of_fence() && shared.server.fence_use().failed == 1, "{error:?}");
    ensure!(receiver.try_next(Ready::FRAME)?.is_none(), "a picture that is not there came");
    row(&shared.give(&mut receiver)?)?;
    PASSED
}

/// A display in another process waits for the fences by itself, and shows each frame.
fn shown() -> Result<Outcome> {
    let at = "/tmp/dmaflow-share-fences.sock";
    let mut source = Fenced::of(camera_with(8)?, |place| match place % 4 {
        0 => Fate::Ready,
        _ => Fate::After(Duration::from_millis(25)),
    })?;
    source.camera.export_read_only()?;
    let request = ServerRequest { budget: 4, lease: Some(Duration::from_secs(2)), ..ServerRequest::default() };
    let mut server = Server::bind(at, request)?;
    let (order, end) = nix::unistd::pipe()?;
    let consumer = std::thread::spawn(move || {
        let line = format!("pipe --from unix:{at} --to vkms --path zero-copy --present fifo --frames 60 --json");
        let run = finish(&mut dmaflow(&line));
        nix::unistd::write(&end, b"x").expect("the pipe takes a byte");
        run
    });
    let limits = Limits { frames: None, duration: Some(Duration::from_secs(200)) };
    let account =
        Pipe::join(&mut source, &mut server, Path::ZeroCopy, limits)?.run(Some(order.as_fd()), &mut |_| {})?;
    let result = consumer.join().expect("no panic")?.json(0)?;
    note(&format!("{} shared; {result}", account.captured));
    ensure!(number(&result, "frames/captured")? == 60 && number(&result, "frames/presented")? == 60, "{result}");
    ensure!(number(&result, "fences/by_device")? > 20 && number(&result, "bytes_copied")? == 0, "{result}");
    ensure!(number(&result, "fences/failed")? + number(&result, "fences/late")? == 0, "{result}");
    // Nothing waited at the server.
    ensure!(account.fences.by_cpu + account.fences.by_device + account.fences.late == 0, "{account:?}");
    source.signal_all()?;
    PASSED
}

/// A frame that a consumer's devices read when it has given it back: the fences come to the source, which does not fill the buffer before
/// they have signalled; till then it is of the consumer's budget.
fn released() -> Result<Outcome> {
    let before = open_descriptors()?;
    let lease = Some(Duration::from_secs(60));
    let (vgem, mut shared) = (Vgem::open()?, Shared::new(6, ServerRequest { lease, ..ServerRequest::default() })?);
    let mut receiver = shared.connect()?;
    let mut other = shared.connect()?;
    let frame = shared.next()?;
    let slot = frame.slot();
    let got = shared.give_this(frame, &mut receiver)?;
    let also = other.try_next(Ready::FRAME)?.context("no frame came to the other")?;
    let [(first, first_signal), (second, second_signal), (third, third_signal)] =
        [vgem.fence()?, vgem.fence()?, vgem.fence()?];
    got.release_after(first);
    got.release_after(second);
    also.release_after(third);
    drop((got, also));
    for receiver in [&mut receiver, &mut other] {
        receiver.recycle()?;
        ensure!(receiver.release_fences().is_empty(), "it was kept by the consumer");
    }
    let leases = |shared: &Shared| shared.server.consumers().iter().map(|info| info.leases).collect::<Vec<_>>();
    drop(shared.give(&mut receiver)?);
    drop(other.try_next(Ready::FRAME)?);
    receiver.recycle()?;
    other.recycle()?;
    drop(shared.give(&mut receiver)?);
    drop(other.try_next(Ready::FRAME)?);
    ensure!(leases(&shared) == [2, 2], "{:?}", leases(&shared));
    let fences = shared.camera.release_fences();
    let mut counts = fences
        .iter()
        .map(|fence| Ok(fence.fences()?.len()))
        .collect::<Result<Vec<_>>>()?;
    counts.sort_unstable();
    ensure!(counts == [1, 2], "{counts:?}: one of each consumer, of two fences the one");
    drop(fences);
    receiver.recycle()?;
    other.recycle()?;
    let comes = |shared: &mut Shared| (0..24).any(|_| shared.next().is_ok_and(|frame| frame.slot() == slot));
    ensure!(!comes(&mut shared), "it was filled while it is read");
    first_signal.now()?;
    third_signal.now()?;
    ensure!(!comes(&mut shared), "it was filled while one reads it");
    second_signal.now()?;
    ensure!(comes(&mut shared), "slot {slot} was lost");
    drop(shared.give(&mut receiver)?);
    ensure!(leases(&shared) == [1, 1], "{:?}", leases(&shared));
    ensure!(shared.server.consumers().iter().all(|info| info.stolen == 0), "{:?}", shared.server.consumers());
    drop((receiver, other, shared, vgem));
    ensure!(open_descriptors()? == before, "{} descriptors instead of {before}", open_descriptors()?);
    PASSED
}

/// A fence that never signals keeps a buffer for as long as a lease, where the camera runs short; and its consumer, no longer either, from
/// frames.
fn never_released() -> Result<Outcome> {
    let before = open_descriptors()?;
    let mut shared = Shared::new(4, ServerRequest { budget: 2, ..ServerRequest::default() })?;
    let (mut stuck, mut other) = (shared.connect()?, shared.connect()?);
    let timeline = Timeline::open()?;
    let (mut gave, mut came) = (0, 0);
    for value in 1..=60 {
        let frame = shared.next()?;
        shared.server.present(frame)?;
        if let Some(frame) = stuck.try_next(Ready::FRAME)? {
            frame.release_after(timeline.fence(value)?);
            gave += 1;
        }
        stuck.recycle()?;
        came += u32::from(other.try_next(Ready::FRAME)?.is_some());
        other.recycle()?;
        ensure!(stuck.release_fences().is_empty(), "it was kept by the consumer");
    }
    let infos = shared.server.consumers();
    note(&format!("{gave} frames behind fences that never signal; {came} to the other; {infos:?}"));
    ensure!(infos.len() == 2 && gave > 2 && infos[0].stolen >= gave - 2, "{infos:?}");
    ensure!(came == 60 && infos[1].stolen == 0 && other.revoked() == 0, "{came} came; {infos:?}");
    // No more of them are open than it may have frames.
    let fences = shared.camera.release_fences().len();
    ensure!(fences <= 2, "{fences} fences are with the camera");
    timeline.advance(100)?;
    drop((stuck, other, shared, timeline));
    ensure!(open_descriptors()? == before, "{} descriptors instead of {before}", open_descriptors()?);
    PASSED
}

/// A consumer that goes gives everything back, fences too.
fn gone() -> Result<Outcome> {
    let before = open_descriptors()?;
    let mut shared =
        Shared::new(6, ServerRequest { lease: Some(Duration::from_secs(60)), ..ServerRequest::default() })?;
    let (mut receiver, timeline) = (shared.connect()?, Timeline::open()?);
    let frame = shared.next()?;
    let slot = frame.slot();
    let got = shared.give_this(frame, &mut receiver)?;
    got.release_after(timeline.fence(1)?);
    drop(got);
    receiver.recycle()?;
    drop(shared.give(&mut receiver)?);
    ensure!(shared.camera.release_fences().len() == 1, "it has not come");
    drop(receiver);
    shared.server.dispatch()?;
    ensure!(shared.server.consumers().is_empty() && shared.camera.release_fences().is_empty(), "it stays");
    ensure!((0..24).any(|_| shared.next().is_ok_and(|frame| frame.slot() == slot)), "slot {slot} was lost");
    drop((shared, timeline));
    ensure!(open_descriptors()? == before, "{} descriptors instead of {before}", open_descriptors()?);
    PASSED
}

/// Fences that a consumer cannot mean end its connection, are closed, and hurt nobody else.
fn hostile() -> Result<Outcome> {
    let before = open_descriptors()?;
    let (vgem, mut shared) = (Vgem::open()?, Shared::new(6, ServerRequest::default())?);
    let mut good = shared.connect()?;
    for (positions, why) in [(&[1, 1][..], "a second fence"), (&[9], "does not have"), (&[u64::MAX], "does not have")] {
        let (socket, (fence, signal)) = (raw(&mut shared)?, vgem.fence()?);
        drop(shared.give(&mut good)?);
        for position in positions {
            let bytes = [&b"dmaf\x01\0\x06\0"[..], &position.to_le_bytes()].concat();
            let fd = [fence.as_fd().as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fd)];
            sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, MsgFlags::empty(), None)?;
        }
        for _ in 0..3 {
            shared.server.dispatch()?;
        }
        let gone = shared.server.departures().last().context("it is still served")?;
        ensure!(gone.at_fault && gone.why.contains(why), "{gone:?}");
        drop((socket, fence));
        signal.now()?;
        row(&shared.give(&mut good)?)?;
    }
    ensure!(good.skipped() == 0 && shared.server.consumers().len() == 1, "{:?}", shared.server.consumers());
    drop((good, shared, vgem));
    ensure!(open_descriptors()? == before, "{} descriptors instead of {before}", open_descriptors()?);
    PASSED
}

/// A connection that has said hello.
fn raw(shared: &mut Shared) -> Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    let name = shared.at.strip_prefix('@').context("a name without a file")?;
    connect(fd.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    let hello = [IoSlice::new(b"dmaf\x01\0\x01\0\0\0\0\0\x07\0hostile")];
    sendmsg::<UnixAddr>(fd.as_raw_fd(), &hello, &[], MsgFlags::empty(), None)?;
    let count = shared.server.consumers().len();
    for _ in 0..4 {
        shared.server.dispatch()?;
    }
    ensure!(shared.server.consumers().len() == count + 1, "it was not let in");
    Ok(fd)
}

/// Many frames, each written when it comes and read when it goes: none is filled before, none is lost, and nothing is left open.
fn both_ways() -> Result<Outcome> {
    const FRAMES: u32 = 120;
    let before = open_descriptors()?;
    let lease = Some(Duration::from_secs(5));
    let (vgem, mut shared) =
        (Vgem::open()?, Shared::new(8, ServerRequest { budget: 3, lease, ..ServerRequest::default() })?);
    let mut receiver = shared.connect()?;
    let (mut signallers, mut came, mut busiest) = (Vec::new(), 0, 0);
    // The last release fence of each slot.
    let mut reads: Vec<Option<SyncFile>> = (0..8).map(|_| None).collect();
    let start = Instant::now();
    while came < FRAMES && start.elapsed() < Duration::from_secs(150) {
        let (frame, (fence, signal)) = (shared.next()?, vgem.fence()?);
        let slot = frame.slot() as usize;
        ensure!(reads[slot].take().is_none_or(|read| read.is_signalled()), "slot {slot} was filled while it is read");
        signallers.push(signal.after(Duration::from_millis(12)));
        shared.server.present(frame.with_acquire_fence(fence))?;
        if let Some(frame) = receiver.try_next(Ready::FRAME)? {
            let (fence, signal) = vgem.fence()?;
            reads[slot] = Some(fence.try_clone()?);
            frame.release_after(fence);
            signallers.push(signal.after(Duration::from_millis(30)));
            came += 1;
        }
        receiver.recycle()?;
        busiest = busiest.max(open_descriptors()?);
    }
    let infos = shared.server.consumers();
    note(&format!(
        "{came} frames in {:?}, {} descriptors at most beside {before}; {infos:?}",
        start.elapsed(),
        busiest - before
    ));
    ensure!(came == FRAMES && infos[0].stolen == 0 && receiver.revoked() == 0, "{came} came; {infos:?}");
    for signaller in signallers {
        signalled(signaller)?;
    }
    drop((reads, receiver, shared, vgem));
    ensure!(open_descriptors()? == before, "{} descriptors instead of {before}", open_descriptors()?);
    PASSED
}
