//! Where frames come from and go to: the traits that devices implement, and an importer's reasoned no.

mod import;
mod predicted;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::fence::{FenceUse, PATIENCE, SyncFile};
use crate::format::{Format, Layout};
use crate::frame::{Buffer, Frame, FrameMeta, Room, ViewPolicy};
use crate::ledger::{Copies, Ledger};

pub use crate::error::errno_name;
pub use import::{ImportCache, Importer};
pub(crate) use predicted::Predicted;

/// What `poll` said of a source's descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ready {
    /// A frame may be there (`POLLIN`).
    pub frame: bool,
    /// An event may be there (`POLLPRI`).
    pub event: bool,
    /// The device or its queue failed (`POLLERR`, `POLLHUP`).
    pub failed: bool,
}

impl Ready {
    /// A frame may be there: what to pass when nothing was polled.
    pub const FRAME: Ready = Ready { frame: true, event: false, failed: false };
}

/// What a source has lost so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SourceCounts {
    /// Frames that the source counted and never delivered (gaps in the sequence).
    pub dropped: u64,
    /// Those of them that were lost while the source may have had no buffer to fill: when the frame before was taken, it had no other. The
    /// rest were lost by the source itself.
    pub starved: u64,
    /// Frames that the source had and this program did not get, because it was late: of what is
    /// [shared](crate::share::Receiver), where the newest frame is what one that is late gets. None of them is in `dropped`.
    pub skipped: u64,
    /// Frames that came marked as damaged and were queued again.
    pub errored: u64,
    /// Whether more may have been dropped than were counted: the flow ended while the source had had no buffer to fill for a frame's
    /// time or longer, and a gap is only seen with the frame after it.
    pub uncounted: bool,
}

/// Produces frames. Its descriptor becomes readable when a frame may be there; nothing blocks.
///
/// Set up in order: configure, [`buffers`](Source::buffers) for the sink to import, [`start`](Source::start), then
/// [`try_next`](Source::try_next) whenever the descriptor is ready.
pub trait Source: AsFd {
    /// What a person calls it: a device node, or `pattern`.
    fn name(&self) -> &str;

    /// The shape of its frames.
    fn layout(&self) -> &Layout;

    /// Frames a second, where known.
    fn rate(&self) -> Option<f64>;

    /// The buffers that its frames will come in.
    fn buffers(&self) -> &[Buffer];

    /// Starts the flow of frames.
    ///
    /// # Errors
    /// The device's refusal; the source can be started again.
    fn start(&mut self) -> Result<()>;

    /// The next frame, or `None` if there is none yet.
    ///
    /// # Errors
    /// [`Kind::Ended`] after the last frame,
    /// [`FormatChanged`](crate::error::Kind::FormatChanged) when the source must be set up anew,
    /// [`Disconnected`](crate::error::Kind::Disconnected) when it is gone.
    fn try_next(&mut self, ready: Ready) -> Result<Option<Frame>>;

    /// Gives slots whose last lease was dropped, and whose release fences have signalled, back to the source.
    /// [`try_next`](Source::try_next) does so too; calling it before waiting lets the source fill them meanwhile.
    ///
    /// # Errors
    /// The device's refusal.
    fn recycle(&mut self) -> Result<()>;

    /// The release fences that keep slots which nobody holds: when one signals, [`recycle`](Source::recycle) may have something to give
    /// back. Without one no allocation and no system call.
    fn release_fences(&self) -> Vec<Arc<SyncFile>> {
        Vec::new()
    }

    /// Whether it has no buffer to fill, nor one that it could: until somebody drops a frame, or one of
    /// [`release_fences`](Source::release_fences) signals. With such fences [`start`](Source::start) waits until it has one. Without them
    /// no system call.
    fn starves(&self) -> bool {
        false
    }

    /// Stops the flow; frames that are leased stay valid.
    ///
    /// # Errors
    /// The device's refusal.
    fn stop(&mut self) -> Result<()>;

    /// Asks for frames laid out with the strides of `wished`, and tells what they will be laid out as and how much memory that needs.
    /// The buffers are given up: [`use_buffers`](Source::use_buffers) or [`use_own_buffers`](Source::use_own_buffers) comes next.
    ///
    /// # Errors
    /// The device's refusal, and for a source that can only fill its own buffers.
    fn agree(&mut self, wished: &Layout) -> Result<(Layout, Room)> {
        let _ = wished;
        Err(Error::new(Kind::Unsupported, "use other buffers in", self.name()).because("it fills its own alone"))
    }

    /// From now on fills `buffers`, which are laid out as [agreed](Source::agree).
    ///
    /// # Errors
    /// The device's refusal; the source has no buffers, or its own, then.
    fn use_buffers(&mut self, buffers: Vec<Buffer>) -> Result<()> {
        drop(buffers);
        Err(Error::new(Kind::Unsupported, "use other buffers in", self.name()).because("it fills its own alone"))
    }

    /// Fills buffers of its own again, new ones.
    ///
    /// # Errors
    /// The device's refusal.
    fn use_own_buffers(&mut self) -> Result<()> {
        Ok(())
    }

    /// From now on its own buffers also have descriptors for reading alone
    /// ([`DmaBuf::read_only`](crate::dmabuf::DmaBuf::read_only)), where it can make such: for those who share them with others that shall
    /// not write. To be called before it is started.
    ///
    /// # Errors
    /// The device's refusal.
    fn export_read_only(&mut self) -> Result<()> {
        Ok(())
    }

    /// After [`FormatChanged`](crate::error::Kind::FormatChanged): stops, learns what comes now, and has new buffers for it, not
    /// started. Frames that are leased stay valid.
    ///
    /// # Errors
    /// [`Kind::Timeout`] while there is no signal that can be locked to: another change will follow. Otherwise the device's refusal.
    fn follow(&mut self) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "follow the change of", self.name()).because("it does not change"))
    }

    /// What was asked of it when it was opened and could not be kept when it last [followed](Source::follow) its source, in words:
    /// `the stride of 2816 bytes`.
    fn not_kept(&self) -> &[String] {
        &[]
    }

    /// What to do when views leave no buffer to fill; [`ViewPolicy::Detach`] at first. A source that never runs short of buffers need
    /// not care.
    fn set_view_policy(&mut self, policy: ViewPolicy) {
        let _ = policy;
    }

    /// The longest wait for a frame that is not a failure.
    fn watchdog(&self) -> Option<Duration> {
        None
    }

    /// The error to report when [`watchdog`](Source::watchdog) has passed without a frame.
    fn stalled(&self) -> Error;

    /// What was lost so far.
    fn counts(&self) -> SourceCounts;

    /// What the CPU copied of its frames for those that held [views](crate::frame::CowView) of them.
    fn copies(&self) -> Vec<Copies> {
        Vec::new()
    }
}

/// A step of the fallback ladder.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rung {
    /// The source's own buffers, used by the sink. No copy.
    Exported,
    /// Buffers of the sink, or of an allocator, that the source captures into. No copy.
    Reverse,
    /// The GPU makes of each frame one that the sink takes. No copy by the CPU.
    Converted,
    /// The CPU copies each frame.
    Copied,
}

impl Rung {
    /// All, in the order in which they are tried.
    pub const ALL: [Rung; 4] = [Rung::Exported, Rung::Reverse, Rung::Converted, Rung::Copied];

    /// Whether no pixel is copied or converted.
    pub fn is_zero_copy(self) -> bool {
        matches!(self, Rung::Exported | Rung::Reverse)
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Rung::Exported => "exported",
            Rung::Reverse => "reverse",
            Rung::Converted => "converted",
            Rung::Copied => "copied",
        })
    }
}

/// An importer's reasoned no: a value, not a log line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The rung that does not hold.
    pub rung: Rung,
    /// The call or check that said no.
    pub step: &'static str,
    /// The errno, where the kernel said no.
    pub errno: Option<i32>,
    /// Why.
    pub why: String,
    /// The cheapest way to make it hold.
    pub repair: String,
}

impl Refusal {
    /// The refusal that an error is: the call that failed, else the step; the errno; what it means, else the chain of causes.
    pub fn from_error(rung: Rung, error: &Error) -> Refusal {
        let why = error
            .known_meaning()
            .map(|meaning| format!("{meaning} ({error})"))
            .unwrap_or_else(|| {
                let mut why = error.to_string();
                let mut cause = std::error::Error::source(error);
                while let Some(next) = cause {
                    why = format!("{why}: {next}");
                    cause = next.source();
                }
                why
            });
        Refusal {
            rung,
            step: error.call().unwrap_or(error.step()),
            errno: error.errno(),
            why,
            repair: error
                .known_repair()
                .unwrap_or("the reason says what would have to be other")
                .to_owned(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} refused at {}: {}", self.rung, self.step, self.why)?;
        if let Some(errno) = self.errno {
            write!(f, " ({})", errno_name(errno))?;
        }
        write!(f, "; {}", self.repair)
    }
}

impl std::error::Error for Refusal {}

/// Why a source and a sink could not be joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The sink cannot take these buffers; another way may do.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Something is broken, whatever the way.
    #[error(transparent)]
    Failed(#[from] Error),
}

/// One frame that a sink has finished showing or storing for the first time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shown {
    /// The frame's data.
    pub meta: FrameMeta,
    /// When, in µs of `CLOCK_MONOTONIC`.
    pub at_us: u64,
}

/// The result of comparing what a display showed with what was captured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// Frames compared: not those that who shares them has taken back meanwhile.
    pub checked: u64,
    /// Frames that were shown wrong.
    pub wrong: u64,
    /// The first frame shown wrong: its place among the captured, counted from 0, and its sequence number.
    pub first_wrong: Option<(u64, u32)>,
}

impl Verdict {
    /// Adds a later one.
    pub(crate) fn add(&mut self, later: Verdict) {
        self.first_wrong = self.first_wrong.or(later.first_wrong);
        self.checked += later.checked;
        self.wrong += later.wrong;
    }
}

/// Consumes frames.
///
/// A sink that wraps another passes on every method, also those that have a default: frames that the other holds back for their fences
/// come to a halt where [`acquire_fences`](Sink::acquire_fences) is not.
pub trait Sink {
    /// What a person calls it: a device node, or `png:FILE`.
    fn name(&self) -> &str;

    /// The formats that it takes, best first; `None` for any.
    fn formats(&self) -> Option<Vec<Format>>;

    /// Gets ready for frames of this shape in these buffers, importing each of them, and changes nothing that a person
    /// sees. `rate` is in frames a second.
    ///
    /// A sink that shows frames already can be joined anew: what it shows stays until the first frame comes. One that refuses, or
    /// fails, is as it was.
    ///
    /// # Errors
    /// A refusal of these buffers, or a failure.
    fn join(&mut self, layout: &Layout, rate: Option<f64>, buffers: &[Buffer]) -> Result<Rung, JoinError>;

    /// Makes buffers that it can show or store for sure: for the source to capture into, or for copies. `layout` is the picture's,
    /// `room` what the source wants of the memory; strides are the sink's choice.
    ///
    /// # Errors
    /// The device's refusal, and for a sink without memory of its own.
    fn allocate(&mut self, layout: &Layout, room: &Room, count: u32) -> Result<Vec<Buffer>> {
        let _ = (layout, room, count);
        Err(Error::new(Kind::Unsupported, "make buffers of", self.name()).because("it has no memory of its own"))
    }

    /// The node of the DRM card that it shows frames on, for others who make memory for that card; `None` for a sink that is no display.
    fn card_node(&self) -> Option<&Path> {
        None
    }

    /// What a person calls the GPU that reads its frames, a DRM node or a name: where frames have to be converted for it, that one does.
    fn gpu_name(&self) -> Option<&str> {
        None
    }

    /// Sees each frame right after its capture, before anyone else touches it. A sink that verifies predicts here what it
    /// must show. `place` is the frame's among all that were captured, counted from 0.
    ///
    /// # Errors
    /// If the frame cannot be read; [`Kind::Revoked`] as from [`present`](Sink::present).
    fn inspect(&mut self, frame: &Frame, place: u64) -> Result<()> {
        let _ = (frame, place);
        Ok(())
    }

    /// Takes a frame, and tells which frame has come on show meanwhile, or because of it.
    ///
    /// A sink that drops a frame while its device still reads it leaves a [release fence](Frame::release_after) with it. One that reads
    /// it waits for its [acquire fence](Frame::acquire_fence) first, or has its device wait.
    ///
    /// # Errors
    /// The device's refusal; [`Kind::Ended`] when it takes no more, as when nobody reads a pipe any more. One [of a
    /// fence](Error::is_of_fence), which has failed or taken too long, is of one frame alone: the sink takes the next. It may be that of a
    /// frame before: the frame given now is taken all the same, unless it cannot be while that fence is open. So that nothing shown goes
    /// untold, such an error may come with a later call; which of several frames it is of, [`fence_use`](Sink::fence_use) counts.
    /// [`Kind::Revoked`] is of this frame alone as well: who shares it has [taken it back](Frame::check), before the sink has used it or
    /// while it did. Who presents it counts it as lost.
    fn present(&mut self, frame: Frame) -> Result<Option<Shown>>;

    /// What to poll for input, if the sink has something to say between two frames.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Whether something waits for the next event. Otherwise it may as well be handled with the next frame, which saves a wake-up:
    /// [`present`](Sink::present) does so.
    fn wants_event(&self) -> bool {
        false
    }

    /// The acquire fences of frames that it holds back until one signals: to poll for input, for [`dispatch`](Sink::dispatch). Without
    /// one no allocation and no system call.
    fn acquire_fences(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// How much longer those may take: when that time is over, [`dispatch`](Sink::dispatch) gives up, with an error that names the fence.
    /// `None` without one. No system call.
    fn acquire_time_left(&self) -> Option<Duration> {
        None
    }

    /// A failure of a frame before that no call has told yet, since each had something shown to tell. Taken once. No system call.
    fn untold(&mut self) -> Option<Error> {
        None
    }

    /// The acquire fences that [`present`](Sink::present) of the frame `next`, or without one [`finish`](Sink::finish), would wait for, and
    /// so be deaf to everything else: who has an order to stop to listen for waits for them beforehand, each
    /// [`fence_timeout`](Sink::fence_timeout) at most. Without one no allocation and no system call.
    ///
    /// That of `next` unless the sink has its device wait, or holds the frame back.
    fn waits_for<'a>(&'a self, next: Option<&'a Frame>) -> Vec<&'a SyncFile> {
        next.and_then(Frame::acquire_fence).into_iter().collect()
    }

    /// How long a fence may take to signal.
    fn fence_timeout(&self) -> Duration {
        PATIENCE
    }

    /// The flow ends, and fences are not waited for any more: gives up the frames that it holds back for them, and
    /// [`finish`](Sink::finish) does not wait for one that the device holds back. Either counts as [dropped](Sink::dropped).
    fn give_up(&mut self) {}

    /// How it waited for the acquire fences of its frames, as far as it was not by reading the frames itself.
    fn fence_use(&self) -> FenceUse {
        FenceUse::default()
    }

    /// Handles what [`event_fd`](Sink::event_fd) or one of [`acquire_fences`](Sink::acquire_fences) announced, or that the latter's
    /// [time](Sink::acquire_time_left) is over.
    ///
    /// # Errors
    /// The device's failure.
    fn dispatch(&mut self) -> Result<Option<Shown>> {
        Ok(None)
    }

    /// Waits for a frame that was taken and is not shown or stored yet, and tells of it; `None` when there is no more. To be
    /// called until then.
    ///
    /// # Errors
    /// The device's failure, or that of the file.
    fn finish(&mut self) -> Result<Option<Shown>> {
        Ok(None)
    }

    /// Keeps showing the newest picture without the source's memory: gives up the source's frames. Frames that were on their way are
    /// [finished](Sink::finish) first. Nothing to do for a sink that holds none.
    ///
    /// # Errors
    /// The device's failure; the frames are held on then.
    fn hold(&mut self) -> Result<()> {
        Ok(())
    }

    /// What has happened to it, beside the frames, since it was asked last: that a person unplugged it, for one, while it takes frames as
    /// before. A clause, for the account of the flow. Asked after each frame, so it is to cost next to nothing.
    fn news(&mut self) -> Option<String> {
        None
    }

    /// Frames taken and never shown, because a newer one came first, because their fences failed or took too long, or because who shares
    /// them took them back meanwhile.
    fn dropped(&self) -> u64 {
        0
    }

    /// How many buffers were imported.
    fn imports(&self) -> u64 {
        0
    }

    /// What the CPU copied.
    fn ledger(&self) -> &Ledger {
        const EMPTY: &Ledger = &Ledger::new();
        EMPTY
    }

    /// The result of verification, where it was asked for.
    fn verdict(&self) -> Option<Verdict> {
        None
    }
}
