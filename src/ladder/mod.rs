//! The fallback ladder: a source and a sink are joined by the first rung that holds, and each that does not leaves its reason.
//!
//! 1. **exported**: the source's own buffers, imported by the sink. No copy.
//! 2. **reverse**: buffers of the sink, of its card's GBM where that renders, or of an allocator, that the source captures into. No copy:
//!    the cure for strides, alignment and contiguity.
//! 3. **converted**: a GPU makes of each frame one that the sink takes. The CPU copies nothing, unless the GPU is made of software.
//! 4. **copied**: the CPU writes each frame into a buffer that the sink takes. One copy, in the ledger.
//!
//! Every rung is tried with real buffers and real imports. What only the first real picture tells (a buffer that the display cannot map),
//! the [`Pipe`](crate::pipe::Pipe) hears, and goes on below.

mod converted;
mod copier;

use crate::convert::Converter;
use crate::endpoint::{JoinError, Refusal, Rung, Sink, Source};
use crate::error::{Error, Kind, Result};
use crate::format::{Format, Layout};
use crate::frame::{Buffer, Room};
use crate::memory::Allocator;

pub use converted::{ByGpu, Watch, converted};
pub use copier::Copier;

/// Which rungs are allowed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Path {
    /// The first that holds.
    #[default]
    Auto,
    /// Those without a copy or conversion, else a refusal.
    ZeroCopy,
    /// A conversion by a GPU at once, also by one made of software.
    Convert,
    /// A copy at once: to compare with, or to keep the source's buffers for nobody but the source.
    Copy,
    /// The rung [`Rung::Reverse`] with the buffers of this maker, else a refusal.
    Reverse(Maker),
}

impl Path {
    /// Whether it is a refusal where pixels would be copied or converted.
    pub fn is_zero_copy(self) -> bool {
        matches!(self, Path::ZeroCopy | Path::Reverse(_))
    }
}

/// A source and a sink, joined.
#[derive(Debug)]
pub struct Joined {
    /// The rung that holds.
    pub rung: Rung,
    /// Why those above it do not, in the order in which they were tried.
    pub refusals: Vec<Refusal>,
    /// What copies or converts, on the rungs [`Rung::Converted`] and [`Rung::Copied`] with a sink that does not read frames itself.
    pub copier: Option<Copier>,
}

/// Why no rung holds.
#[derive(Debug, thiserror::Error)]
pub enum NoWay {
    /// Every rung that is allowed was refused.
    #[error("{}", last(.0))]
    Refused(Vec<Refusal>),
    /// Something is broken, whatever the rung.
    #[error(transparent)]
    Failed(#[from] Error),
}

/// The last refusal says what is left to do; those before it led there.
fn last(refusals: &[Refusal]) -> String {
    refusals
        .last()
        .map_or_else(|| "there is no rung to try".to_owned(), Refusal::to_string)
}

/// Joins a source that does not stream to a sink. Nothing flows, and nobody sees a change. With `watch` the GPUs that are opened for it are
/// watched.
///
/// # Errors
/// [`NoWay`]. The source has buffers of its own again then.
pub fn join(
    source: &mut dyn Source,
    sink: &mut dyn Sink,
    path: Path,
    watch: Option<&mut Watch>,
) -> Result<Joined, NoWay> {
    if let Path::Reverse(maker) = path {
        return demanded(source, sink, maker);
    }
    let mut refusals = Vec::new();
    if path == Path::Convert {
        let copier = converted(source, sink, true, watch)?.map_err(|refusal| NoWay::Refused(vec![refusal]))?;
        return Ok(Joined { rung: Rung::Converted, refusals, copier: Some(copier) });
    }
    if path != Path::Copy || sink.formats().is_none() {
        match exported(source, sink) {
            // A sink that reads frames with the CPU.
            Ok(Rung::Copied) if path == Path::ZeroCopy => {
                refusals.push(reads_itself());
                return Err(NoWay::Refused(refusals));
            }
            Ok(rung) if path != Path::Copy || rung == Rung::Copied => {
                return Ok(Joined { rung, refusals, copier: None });
            }
            Ok(_) => {}
            Err(JoinError::Refused(refusal)) => refusals.push(refusal),
            Err(JoinError::Failed(error)) => return Err(error.into()),
        }
    }
    if path != Path::Copy {
        let (held, more) = reverse(source, sink, refusals.last())?;
        refusals.extend(more);
        if let Some(rung) = held {
            return Ok(Joined { rung, refusals, copier: None });
        }
    }
    if path == Path::ZeroCopy {
        return Err(NoWay::Refused(refusals));
    }
    if path == Path::Auto {
        match converted(source, sink, false, watch)? {
            Ok(copier) => return Ok(Joined { rung: Rung::Converted, refusals, copier: Some(copier) }),
            Err(refusal) => refusals.push(refusal),
        }
    }
    match copied(source, sink, path == Path::Copy)? {
        Ok(copier) => Ok(Joined { rung: Rung::Copied, refusals, copier: Some(copier) }),
        Err(refusal) => {
            refusals.push(refusal);
            Err(NoWay::Refused(refusals))
        }
    }
}

/// The buffers of this maker, and no others.
fn demanded(source: &mut dyn Source, sink: &mut dyn Sink, maker: Maker) -> Result<Joined, NoWay> {
    let (layout, count) = (*source.layout(), buffer_count(source));
    let refusal = match lacks_format(&layout, sink, None) {
        Some(refusal) => refusal,
        None => match reverse_by(source, sink, maker, count)? {
            Ok(Rung::Reverse) => return Ok(Joined { rung: Rung::Reverse, refusals: Vec::new(), copier: None }),
            Ok(_) => {
                put_back(source, &layout)?;
                Refusal { rung: Rung::Reverse, ..reads_itself() }
            }
            Err(refusal) => {
                put_back(source, &layout)?;
                refusal
            }
        },
    };
    Err(NoWay::Refused(vec![refusal]))
}

/// The source's own buffers. A sink that reads each frame with the CPU says [`Rung::Copied`].
///
/// # Errors
/// The sink's refusal, or a failure.
pub fn exported(source: &dyn Source, sink: &mut dyn Sink) -> Result<Rung, JoinError> {
    sink.join(source.layout(), source.rate(), source.buffers())
}

/// What is said of the rungs without a copy for such a sink.
pub(crate) fn reads_itself() -> Refusal {
    Refusal {
        rung: Rung::Exported,
        step: "join",
        errno: None,
        why: "this sink reads every frame with the CPU".to_owned(),
        repair: "send the frames to a display, or allow copies".to_owned(),
    }
}

/// Who makes buffers that the source does not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Maker {
    /// The sink itself: a display's dumb buffers, a GPU's own.
    Sink,
    /// The GBM of the display's card: what the driver makes for scanout where that is more than dumb buffers.
    #[cfg(feature = "gbm")]
    Gbm,
    /// An allocator that belongs to no device.
    Allocator(Allocator),
}

impl Maker {
    /// In the order in which they are tried. The kernel's part of a display before the GPU driver's, which has to be loaded; a heap before
    /// udmabuf: its memory may be what the devices share.
    const DMA_BUF: &[Maker] = &[
        Maker::Sink,
        #[cfg(feature = "gbm")]
        Maker::Gbm,
        Maker::Allocator(Allocator::SystemHeap),
        Maker::Allocator(Allocator::Udmabuf),
    ];

    /// Those that there are for this sink, in the order in which they are tried.
    pub(crate) fn of_dma_bufs(sink: &dyn Sink) -> impl Iterator<Item = Maker> + use<> {
        // One that makes the same dumb buffers again, and prints lines of its own while it does, is there for who asks for it alone.
        #[cfg(feature = "gbm")]
        let has_gbm = sink.card_node().is_some_and(crate::gbm::Device::renders);
        #[cfg(not(feature = "gbm"))]
        let _ = sink;
        let there = move |maker: &Maker| match maker {
            #[cfg(feature = "gbm")]
            Maker::Gbm => has_gbm,
            Maker::Sink | Maker::Allocator(_) => true,
        };
        Maker::DMA_BUF.iter().copied().filter(there)
    }

    pub(crate) fn name(self, sink: &dyn Sink) -> String {
        match self {
            Maker::Sink => sink.name().to_owned(),
            #[cfg(feature = "gbm")]
            Maker::Gbm => format!("GBM on {}", sink.name()),
            Maker::Allocator(allocator) => allocator.to_string(),
        }
    }

    fn make(self, sink: &mut dyn Sink, layout: &Layout, room: &Room, count: u32) -> Result<Vec<Buffer>> {
        match self {
            Maker::Sink => sink.allocate(layout, room, count),
            #[cfg(feature = "gbm")]
            Maker::Gbm => by_gbm(sink, layout, room, count),
            // Rows as the pickiest displays known want them; where the source has agreed to a layout it has such rows already.
            Maker::Allocator(allocator) => {
                let layout = layout.with_stride_align(STRIDE);
                let bad = |cause| Error::new(Kind::Invalid, "lay out", "a buffer").because(cause);
                Buffer::allocate_all(allocator, &layout.map_err(bad)?, room, count)
            }
        }
    }
}

/// Linear, so that a camera or the CPU can fill them, and fit for scanout.
#[cfg(feature = "gbm")]
fn by_gbm(sink: &dyn Sink, layout: &Layout, room: &Room, count: u32) -> Result<Vec<Buffer>> {
    use crate::format::Modifier;
    use crate::gbm::{Device, Usage};
    let Some(card) = sink.card_node() else {
        let error = Error::new(Kind::Unsupported, "make buffers by GBM for", sink.name()).because("it is no display");
        return Err(error.repair("use the sink's own buffers"));
    };
    let device = Device::of_card(card)?;
    let make = |_| device.make_buffer(layout, room, Usage::SCANOUT, &[Modifier::LINEAR]);
    (0..count).map(make).collect()
}

/// AMD's displays want strides in multiples of 256 bytes; no other known one wants more.
const STRIDE: u32 = 256;

/// Buffers that the source does not make; at last its own once more, with rows such as the sink's own have. Tells which of the two
/// rungs holds, if one does, and the reason of each maker whose buffers do not.
///
/// # Errors
/// If the source cannot go back to its own buffers.
pub fn reverse(
    source: &mut dyn Source,
    sink: &mut dyn Sink,
    exported: Option<&Refusal>,
) -> Result<(Option<Rung>, Vec<Refusal>)> {
    let layout = *source.layout();
    if let Some(refusal) = lacks_format(&layout, sink, exported) {
        return Ok((None, vec![refusal]));
    }
    let count = buffer_count(source);
    let mut refusals = Vec::new();
    for maker in Maker::of_dma_bufs(sink) {
        match reverse_by(source, sink, maker, count)? {
            Ok(_) => return Ok((Some(Rung::Reverse), refusals)),
            Err(refusal) => refusals.push(refusal),
        }
        put_back(source, &layout)?;
    }
    if other_rows(source, sink, &layout).is_ok() {
        return Ok((Some(Rung::Exported), refusals));
    }
    put_back(source, &layout)?;
    Ok((None, refusals))
}

/// As many as the source has.
pub(crate) fn buffer_count(source: &dyn Source) -> u32 {
    u32::try_from(source.buffers().len()).unwrap_or(u32::MAX).max(1)
}

/// What no other buffers cure: whoever makes the memory, the pixels are what they are.
pub(crate) fn lacks_format(layout: &Layout, sink: &dyn Sink, exported: Option<&Refusal>) -> Option<Refusal> {
    let format = layout.format();
    if sink.formats().is_none_or(|formats| formats.contains(&format)) {
        return None;
    }
    let why = exported.map_or_else(|| format!("the sink has no {format}"), |refusal| refusal.why.clone());
    let repair = exported.map_or_else(|| "choose a format that both have".to_owned(), |refusal| refusal.repair.clone());
    let step = exported.map_or("formats", |refusal| refusal.step);
    Some(Refusal { rung: Rung::Reverse, step, errno: None, why, repair })
}

/// Buffers of this maker; [`Rung::Copied`] for a sink that reads each frame with the CPU. `Ok(Err(…))` has the reason why not; the source
/// may be without buffers then.
///
/// # Errors
/// If the source or the sink is gone.
pub(crate) fn reverse_by(
    source: &mut dyn Source,
    sink: &mut dyn Sink,
    maker: Maker,
    count: u32,
) -> Result<Result<Rung, Refusal>> {
    let layout = *source.layout();
    let whose = maker.name(sink);
    let refusal = match try_reverse(source, sink, maker, &layout, count) {
        Ok(Rung::Exported) => return Ok(Ok(Rung::Reverse)),
        Ok(other) => return Ok(Ok(other)),
        Err(JoinError::Refused(refusal)) => Refusal { rung: Rung::Reverse, ..refusal },
        Err(JoinError::Failed(error)) if error.kind() == Kind::Disconnected => return Err(error),
        Err(JoinError::Failed(error)) => Refusal::from_error(Rung::Reverse, &error),
    };
    let why = format!("with buffers of {whose}: {}", refusal.why);
    Ok(Err(Refusal { why, ..refusal }))
}

/// The source's own buffers, with strides such as the sink's have. Failures are the reasons of before.
pub(crate) fn other_rows(source: &mut dyn Source, sink: &mut dyn Sink, layout: &Layout) -> Result<(), JoinError> {
    let trial = sink.allocate(&one_memory_plane(layout)?, &Room::default(), 1)?;
    let wished = trial.first().map_or(*layout, |buffer| *buffer.layout());
    drop(trial);
    source.agree(&wished)?;
    source.use_own_buffers()?;
    exported(source, sink).map(drop)
}

fn try_reverse(
    source: &mut dyn Source,
    sink: &mut dyn Sink,
    maker: Maker,
    layout: &Layout,
    count: u32,
) -> Result<Rung, JoinError> {
    // One buffer first, which the source need not know of: it tells the strides, and whether the sink takes such memory at all.
    let first = one_memory_plane(layout)?;
    let trial = maker.make(sink, &first, &Room::default(), 1)?;
    let wished = trial.first().map_or(first, |buffer| *buffer.layout());
    sink.join(&wished, source.rate(), &trial)?;
    drop(trial);
    let (agreed, room) = source.agree(&wished)?;
    if let Some(why) = differs(&wished, &agreed) {
        return Err(JoinError::Refused(Refusal {
            rung: Rung::Reverse,
            step: "VIDIOC_S_FMT",
            errno: None,
            why: format!("{} {why}", source.name()),
            repair: "choose a width whose rows suit both".to_owned(),
        }));
    }
    let buffers = maker.make(sink, &agreed, &room, count)?;
    source.use_buffers(buffers)?;
    sink.join(source.layout(), source.rate(), source.buffers())
}

/// The same picture in one memory plane, its rows as short as they can be.
fn one_memory_plane(layout: &Layout) -> Result<Layout> {
    let bad = |cause| Error::new(Kind::Invalid, "lay out", "a buffer").because(cause);
    Ok(Layout::packed(layout.format(), layout.size(), 1)
        .map_err(bad)?
        .with_colour(layout.colour()))
}

/// How the layout that a source has agreed to is another than the one asked for.
fn differs(wished: &Layout, agreed: &Layout) -> Option<String> {
    if wished.memory_planes() != agreed.memory_planes() {
        return Some(format!(
            "fills {} memory planes, and the buffers have {}",
            agreed.memory_planes(),
            wished.memory_planes()
        ));
    }
    let strides = wished.planes().iter().zip(agreed.planes());
    let other = strides
        .map(|(wished, agreed)| (wished.stride, agreed.stride))
        .find(|(wished, agreed)| wished != agreed);
    other.map(|(wished, agreed)| format!("makes rows of {agreed} bytes, and the buffers have {wished}"))
}

/// The source as it was: the layout that it had, in buffers of its own.
fn put_back(source: &mut dyn Source, layout: &Layout) -> Result<()> {
    source.agree(layout)?;
    source.use_own_buffers()
}

/// Copies by the CPU, into buffers that the sink takes. `Ok(Err(…))` has the reason why not.
///
/// # Errors
/// A failure of the sink.
pub fn copied(source: &dyn Source, sink: &mut dyn Sink, demanded: bool) -> Result<Result<Copier, Refusal>> {
    let layout = *source.layout();
    let taken = sink.formats();
    let takes = |format: &Format| taken.as_ref().is_none_or(|taken| taken.contains(format));
    let mut refused = None;
    for target in Converter::targets(layout.format()).filter(takes) {
        for maker in Maker::of_dma_bufs(sink).chain([Maker::Allocator(Allocator::Plain)]) {
            match try_copied(source, sink, maker, target, demanded) {
                Ok(copier) => return Ok(Ok(copier)),
                Err(JoinError::Refused(refusal)) => {
                    refused.get_or_insert(Refusal { rung: Rung::Copied, ..refusal });
                }
                Err(JoinError::Failed(error)) if error.kind() == Kind::Disconnected => {
                    return Err(error);
                }
                Err(JoinError::Failed(error)) => {
                    refused.get_or_insert(Refusal::from_error(Rung::Copied, &error));
                }
            }
        }
    }
    Ok(Err(refused.unwrap_or_else(|| Refusal {
        rung: Rung::Copied,
        step: "conversion",
        errno: None,
        why: format!("the CPU makes of {1} nothing that {0} takes", sink.name(), layout.format()),
        repair: "choose another format of the source".to_owned(),
    })))
}

fn try_copied(
    source: &dyn Source,
    sink: &mut dyn Sink,
    maker: Maker,
    target: Format,
    demanded: bool,
) -> Result<Copier, JoinError> {
    let from = source.layout();
    let bad = |cause| Error::new(Kind::Invalid, "lay out", "a buffer").because(cause);
    let to = Layout::packed(target, from.size(), 1).map_err(bad)?.with_colour(from.colour());
    let buffers = maker.make(sink, &to, &Room::default(), copier::BUFFERS)?;
    let copier = Copier::by_cpu(from, buffers, demanded)?;
    sink.join(copier.layout(), source.rate(), copier.buffers())?;
    Ok(copier)
}
