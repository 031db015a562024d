//! `Server`: the sink that gives frames to other processes.

mod door;
mod request;
mod shortage;
mod tend;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::consumer::{Consumer, ConsumerInfo, Departure, Generation, Lost};
use super::entry::Entry;
use super::give::Gift;
use super::listener::Listener;
use super::lock::is_held;
use super::peer::{Access, Peer};
use super::socket::Place;
use super::wire::{Message, Reason, Shape, Timing, Welcome};
use crate::clock::now_us;
use crate::endpoint::{JoinError, Refusal, Rung, Shown, Sink};
use crate::error::{Context, Error, Kind, Result};
use crate::fence::{FenceUse, SyncFile};
use crate::format::{Format, Layout};
use crate::frame::{Buffer, Frame, MAX_SLOTS, SlotsArc};
use crate::timer::Timer;
use door::Waiting;
pub use request::ServerRequest;
use request::{access, check, mode, passed};

/// The most consumers that a server has, and the most connections that have not said hello.
pub const MAX_CONSUMERS: usize = 64;

/// How long consumers wait at most until their sockets are looked at while frames come without a pause.
const LOOK: Duration = Duration::from_millis(100);
/// How long until a consumer is told the rest that could not be told all at once.
const TELL_AGAIN: Duration = Duration::from_millis(10);
/// The lease where the rate is not known.
const LEASE: Duration = Duration::from_millis(100);
/// Departures that are kept for reports.
const DEPARTURES: usize = 64;

/// Names in the list of descriptors. A connection has an even number for its socket, and the next for its bell.
const LISTENER: u64 = 0;
const TIMER: u64 = 1;

/// A [`Sink`] that gives each frame to any number of other processes, which use a [`Receiver`](super::Receiver) as if it were the source.
///
/// No pixel is copied: consumers get the source's buffers once, and then a frame's number by a ring in shared memory. To present a frame
/// costs some ten loads and stores for each consumer, and a system call for each that sleeps. What consumers do (connect, hang up, release
/// when the camera waits for it) comes by [`event_fd`](Sink::event_fd) and is handled by [`dispatch`](Sink::dispatch).
///
/// A consumer may have a few frames at a time; older ones that it has not taken are skipped for newer ones. It may keep a frame for the
/// time of its lease; after that the frame is taken back when the source has no buffer left to fill, and the consumer is told so when it
/// [asks](super::Receiver::holds). Before that, frames are taken back that nobody has taken. A consumer that writes nonsense into its ring
/// or its socket is disconnected. Nothing here waits for a consumer.
///
/// One user that is not the server's own may have 16 connections, and all such users together 48. A consumer that does not read what it is
/// told of new buffers is disconnected after three seconds if it is in the way.
///
/// Fences go along: [`present`](Sink::present). A consumer that leaves the messages unread by which they come is skipped, as one that is late.
/// Its own release fences it may have no more than frames, and a fence that has not signalled when the lease has run out is not waited for
/// when the source runs short; nor are those of a consumer that has gone.
///
/// Consumers can map the buffers that they get for reading and not for writing, unless the [request](ServerRequest) says otherwise: so what
/// is shared must be such that this can be had. A camera's own buffers are, once it was told to
/// [export them so](crate::endpoint::Source::export_read_only); those of plain memory and udmabufs are. This binds the CPU alone: a consumer
/// that has a device which writes into dma-bufs (a V4L2 node, a GPU) can have it write into these, and the kernel knows no dma-buf of which
/// that is not so; with a GPU it can also put fences into them for which others' displays wait (`DMA_BUF_IOCTL_IMPORT_SYNC_FILE` looks at no
/// mode). And whoever has got a buffer or a fence can make the last close of it wait, by an epoll list that it is in
/// (`eventpoll_release_file` in fs/eventpoll.c): at a change of the format, at the end, after a frame with a fence. Who is let in is trusted
/// that far. Only processes of the server's own user may connect, unless the request says otherwise.
///
/// Dropping it takes all frames back and tells the consumers that the source has ended. To let them have the frames that are on their way,
/// [`end`](Server::end) it after the source was stopped.
#[derive(Debug)]
pub struct Server {
    name: String,
    listener: Listener,
    epoll: Epoll,
    timer: Timer,
    request: ServerRequest,
    source: String,
    watchdog: Option<Duration>,
    rate: Option<f64>,
    access: Access,
    generation: Option<Arc<Generation>>,
    generations: u32,
    waiting: Vec<Waiting>,
    pub(super) consumers: Vec<Consumer>,
    departures: VecDeque<Departure>,
    /// The number of departures so far.
    departed: u64,
    /// When somebody was noted last that had not said hello.
    stranger_us: Option<u64>,
    /// The number of connections so far.
    connections: u64,
    /// The number of frames so far.
    number: u64,
    /// Those of the newest frame's source.
    slots: Option<SourceSlots>,
    /// The slot of the frame that is just presented, if no consumer got it: whoever presents it may have it still, and not for longer.
    passing: Option<u32>,
    /// Whether a consumer is still to be told of buffers.
    untold: bool,
    /// When connections are accepted again.
    paused_until_us: Option<u64>,
    /// When the descriptors were looked at last.
    looked_us: u64,
    fences: FenceUse,
    ended: bool,
}

/// Frames that come over a share themselves: their server may take one back, and would wait for nobody but its own consumer. Those of that
/// consumer would keep its few frames from each other, and none of them could be told what was taken back.
fn lent() -> Refusal {
    Refusal {
        rung: Rung::Exported,
        step: "join",
        errno: None,
        why: "its frames are another server's, which may take them back, and consumers here could not be told"
            .to_owned(),
        repair: "connect to the first server itself, or let frames be copied".to_owned(),
    }
}

/// The slots of a source, with a `Debug` that says how many are where.
struct SourceSlots(SlotsArc);

impl std::fmt::Debug for SourceSlots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.counts().fmt(f)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX / 2)
}

impl Server {
    /// Begins to listen at `place`: the path of a socket, or `@name` for one without a file. The file of a server that is gone is replaced;
    /// it goes with this server.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another server listens there; [`Kind::Invalid`] for a budget out of range, and for mode or group of a name without a
    /// file; what the system says.
    pub fn bind(place: &str, request: ServerRequest) -> Result<Server> {
        let place = Place::parse(place);
        check(&request)?;
        let file = request.mode.is_some() || request.group.is_some();
        if file && matches!(place, Place::Abstract(_)) {
            let error = Error::new(Kind::Invalid, "listen at", place.to_string());
            return Err(error
                .because("mode and group are a file's, and a name without a file has none")
                .repair("say which users and groups may connect (--allow-uid, --allow-gid), or give a path"));
        }
        let listener = Listener::bind(&place, mode(&request), request.group)?;
        Server::over(listener, &place, request)
    }

    /// The same at a socket that listens already, as a service manager passes it (sd_listen_fds(3)): of type `SOCK_SEQPACKET`, with a
    /// path or an abstract name. Its file stays. Who may connect is said by that file's mode and group, as the manager has made it
    /// (`SocketMode=`, `SocketGroup=`), in place of the request's: a file that its group may write to lets the group connect, one that all
    /// may write to (systemd's default, 0666) lets everybody, but where the request names users or groups those alone. If the file at the
    /// socket's path is not this user's or root's, or is no socket, or has other names, it says nothing, as with an abstract name.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for another sort of socket, and for a budget out of range; what the system says.
    pub fn bind_inherited(socket: OwnedFd, request: ServerRequest) -> Result<Server> {
        check(&request)?;
        let (listener, place) = Listener::inherit(socket)?;
        let request = passed(request, listener.passed_mode(), listener.group());
        Server::over(listener, &place, request)
    }

    fn over(listener: Listener, place: &Place, request: ServerRequest) -> Result<Server> {
        let name = place.to_string();
        let about = || name.clone();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("share at", about)?;
        let timer = Timer::new().context("make a timer for", about)?;
        let input = |token| EpollEvent::new(EpollFlags::EPOLLIN, token);
        epoll.add(&listener, input(LISTENER)).context("wait for", about)?;
        epoll.add(&timer, input(TIMER)).context("wait for", about)?;
        Ok(Server {
            name,
            access: access(&request, listener.group()),
            listener,
            epoll,
            timer,
            request,
            source: String::new(),
            watchdog: None,
            rate: None,
            generation: None,
            generations: 0,
            waiting: Vec::new(),
            consumers: Vec::new(),
            departures: VecDeque::new(),
            departed: 0,
            stranger_us: None,
            connections: 0,
            number: 0,
            slots: None,
            passing: None,
            untold: false,
            paused_until_us: None,
            looked_us: 0,
            fences: FenceUse::default(),
            ended: false,
        })
    }

    /// Whether a server lives that listens at this path: nobody connects to it for that, so that a socket behind which a service manager waits
    /// starts nothing. Servers that are not of this library do not say so, nor do those at names without a file. Cost: two system calls.
    pub fn lives_at(path: &Path) -> bool {
        is_held(path)
    }

    /// What consumers are told of the source: when they connect its name, and with each format that is joined the longest wait for a frame
    /// that is no failure (`None` if any is right).
    pub fn describe(&mut self, source: &str, watchdog: Option<Duration>) {
        (self.source, self.watchdog) = (source.to_owned(), watchdog);
    }

    /// Who is served now. Cost: the last 128 latencies of each are sorted; no system call.
    pub fn consumers(&self) -> Vec<ConsumerInfo> {
        self.consumers.iter().map(Consumer::info).collect()
    }

    /// Who was served, and why no longer: the last 64, oldest first.
    pub fn departures(&self) -> impl Iterator<Item = &Departure> {
        self.departures.iter()
    }

    /// How many have gone so far, also those that [`departures`](Server::departures) has no more. One load.
    pub fn departed(&self) -> u64 {
        self.departed
    }

    /// How long a consumer may keep a frame at least, of the format that was joined last.
    pub fn lease(&self) -> Duration {
        let frames = |rate: f64| Duration::try_from_secs_f64(3.0 / rate).ok();
        let lease = self.request.lease.or_else(|| self.rate.and_then(frames)).unwrap_or(LEASE);
        lease.max(Duration::from_millis(1))
    }

    /// Tells the consumers that the source has ended; they get the frames on their way first. To be called when the source was stopped:
    /// their buffers are not kept from it any longer when this is dropped. (Not [`Sink::finish`]: that comes also when the source changes
    /// its format, and its frames go on.)
    pub fn end(&mut self) {
        self.part(Reason::Ended, "");
    }

    /// As [`Server::end`], for a source that has failed; `why` is what consumers are told.
    pub fn fail(&mut self, why: &str) {
        self.part(Reason::Failed, why);
    }

    fn part(&mut self, reason: Reason, text: &str) {
        if !std::mem::replace(&mut self.ended, true) {
            let message = Message::End { reason, text: text.to_owned() };
            self.consumers.iter_mut().for_each(|consumer| consumer.part(&message));
        }
    }

    fn welcome(&self) -> Welcome {
        // Whether it may send fences is a matter of who it is.
        Welcome { budget: self.request.budget, fences: false, source: self.source.clone() }
    }

    /// As it is for what is joined now.
    fn timing(&self) -> Timing {
        Timing {
            lease_us: micros(self.lease()),
            // `as` saturates, and what is no number becomes 0: not known.
            rate_micro: self.rate.map_or(0, |rate| (rate * 1e6).round() as u64),
            watchdog_us: self.watchdog.map_or(0, micros),
        }
    }

    /// Gives up all that a consumer has, and forgets it.
    fn lose(&mut self, token: u64, Lost { why, at_fault, left }: Lost) {
        let Some(index) = self.consumers.iter().position(|consumer| consumer.token == token) else { return };
        let mut consumer = self.consumers.swap_remove(index);
        let info = consumer.info();
        // It may still look at the ring: there it finds that it has nothing.
        consumer.ring.take_all_back();
        if at_fault {
            consumer.part(&Message::End { reason: Reason::Broken, text: why.clone() });
        }
        self.note(Departure { consumer: info, why, at_fault, left });
    }

    fn note(&mut self, departure: Departure) {
        if self.departures.len() >= DEPARTURES {
            self.departures.pop_front();
        }
        self.departures.push_back(departure);
        self.departed += 1;
    }

    #[cold]
    fn lose_all(&mut self, all: Vec<(u64, Lost)>) {
        for (token, lost) in all {
            self.lose(token, lost);
        }
    }

    fn refuse(&self, why: String) -> JoinError {
        JoinError::Refused(Refusal {
            rung: Rung::Exported,
            step: "join",
            errno: None,
            why,
            repair: "give the source 1 to 64 buffers of one layout".to_owned(),
        })
    }
}

impl Sink for Server {
    fn name(&self) -> &str {
        &self.name
    }

    fn formats(&self) -> Option<Vec<Format>> {
        None
    }

    /// Begins a generation of buffers, of which all consumers are told. Buffers that come from another server are refused
    /// ([`Buffer::is_lent`]): that one may take their frames back, of which consumers here could not be told. Cost: a message for each
    /// buffer and consumer.
    fn join(&mut self, layout: &Layout, rate: Option<f64>, buffers: &[Buffer]) -> Result<Rung, JoinError> {
        let count = u32::try_from(buffers.len()).unwrap_or(u32::MAX);
        if !(1..=MAX_SLOTS).contains(&count) {
            return Err(self.refuse(format!("{count} buffers cannot be shared")));
        }
        if let Some(other) = buffers.iter().find(|buffer| buffer.layout() != layout) {
            return Err(self.refuse(format!("a buffer is laid out as {}, and not as {layout}", other.layout())));
        }
        if buffers.iter().any(Buffer::is_lent) {
            return Err(JoinError::Refused(lent()));
        }
        let planes = layout.memory_planes();
        let least = |plane: usize| {
            buffers
                .iter()
                .filter_map(|buffer| buffer.memory_lens().get(plane).copied())
                .min()
        };
        let lens: Vec<_> = (0..planes).map(|plane| least(plane).unwrap_or(0) as u64).collect();
        let writable = self.request.writable;
        let gifts = buffers
            .iter()
            .map(|buffer| Gift::new(buffer, writable))
            .collect::<Result<Vec<_>>>();
        let gifts = gifts.map_err(|error| match error.kind() {
            Kind::Unsupported | Kind::Permission => JoinError::Refused(Refusal::from_error(Rung::Exported, &error)),
            _ => JoinError::Failed(error),
        })?;
        self.generations = self.generations.wrapping_add(1);
        self.rate = rate;
        let timing = self.timing();
        let shape = Shape { generation: self.generations, buffers: count, timing, layout: *layout, lens };
        let generation = Arc::new(Generation { shape, gifts });
        let welcome = self.welcome();
        let mut lost = Vec::new();
        for consumer in &mut self.consumers {
            if let Err(error) = consumer.greet(&welcome, &generation) {
                lost.push((consumer.token, Lost::untold(&error)));
            }
            self.untold |= consumer.is_untold();
        }
        self.generation = Some(generation);
        self.slots = None;
        self.lose_all(lost);
        // What could not be told now is a matter of time.
        self.tend(now_us()).map_err(JoinError::Failed)?;
        Ok(Rung::Exported)
    }

    /// A frame that a device still writes is published at once, with its [acquire fence](Frame::acquire_fence), which consumers' frames have
    /// then; that costs two system calls for each consumer. One that a consumer's device still reads when the consumer has dropped it has
    /// that [release fence](Frame::release_after) here as well, as a sink of this process would leave it.
    ///
    /// # Errors
    /// [Of a fence](Error::is_of_fence) that has signalled with an error: there is no picture, and the frame is not published.
    fn present(&mut self, frame: Frame) -> Result<Option<Shown>> {
        let fence = match frame.acquire_fence().map_or(Ok(true), SyncFile::check) {
            Ok(true) => None,
            Ok(false) => frame.acquire_fence(),
            Err(error) => {
                self.fences.lose(&error);
                return Err(error);
            }
        };
        self.fences.went_well();
        let now = now_us();
        let unknown = || Error::new(Kind::Invalid, "share", "a frame").because("it is in a buffer that was not joined");
        let generation = self.generation.as_ref().ok_or_else(unknown)?;
        let buffer = generation
            .gifts
            .iter()
            .position(|gift| gift.buffer().same_handle(frame.buffer()));
        // No more than 64.
        let buffer = buffer.ok_or_else(unknown)? as u32;
        let meta = *frame.meta();
        let (generation, fenced) = (generation.shape.generation, fence.is_some());
        let entry = Entry { generation, buffer, meta, skipped: 0, published_us: now, fenced };
        self.number += 1;
        let (mut lost, mut given) = (None, false);
        for consumer in &mut self.consumers {
            match consumer.publish(&entry, self.number, &frame, fence) {
                Ok(got) => given |= got,
                Err(why) => lost.get_or_insert_with(Vec::new).push((consumer.token, why)),
            }
        }
        if let Some(lost) = lost {
            self.lose_all(lost);
        }
        let slots = frame.lease().slots_arc();
        if !self.slots.as_ref().is_some_and(|before| SlotsArc::ptr_eq(&before.0, slots)) {
            self.slots = Some(SourceSlots(SlotsArc::clone(slots)));
        }
        self.passing = (!given).then_some(frame.slot());
        drop(frame);
        match now.saturating_sub(self.looked_us) >= micros(LOOK) {
            true => self.look()?,
            false => self.tend(now)?,
        }
        Ok(Some(Shown { meta, at_us: now }))
    }

    /// Readable when a consumer connects, hangs up or releases a frame that is waited for, and when a lease runs out that is in the way.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.0.as_fd())
    }

    fn wants_event(&self) -> bool {
        true
    }

    /// None: consumers wait, or have their devices wait.
    fn waits_for<'a>(&'a self, _: Option<&'a Frame>) -> Vec<&'a SyncFile> {
        Vec::new()
    }

    /// Of frames that were published with their fences it is not known here how those went on.
    fn fence_use(&self) -> FenceUse {
        self.fences
    }

    fn dispatch(&mut self) -> Result<Option<Shown>> {
        self.passing = None;
        self.look()?;
        Ok(None)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        for consumer in &mut self.consumers {
            consumer.ring.take_all_back();
        }
        self.end();
    }
}
