//! What a receiver gets from its server: an answer when it connects, and buffers. Nothing of it is believed before it is checked.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::statfs::{FsType, fstatfs};

use super::give::identity;
use super::socket::Place;
use super::wire::{Message, Shape};
use crate::dmabuf::DmaBuf;
use crate::error::{Context, Error, Kind, Result};
use crate::frame::Buffer;
use crate::memory::Memory;

/// Generations that are kept while they are announced and not followed yet: so many as a ring has entries. Of more, the oldest are
/// forgotten with their descriptors; a frame of them that is still in the ring is passed over.
pub(super) const COMING: usize = 16;

/// `DMA_BUF_MAGIC` of linux/magic.h.
const DMA_BUF: FsType = FsType(0x444d_4142);

/// Buffers of one shape, as far as they have come.
#[derive(Debug)]
pub(super) struct Generation {
    pub shape: Shape,
    pub buffers: Vec<Buffer>,
}

impl Generation {
    pub(super) fn is_whole(&self) -> bool {
        self.buffers.len() == self.shape.buffers as usize
    }
}

/// What is announced, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Coming {
    generations: VecDeque<Generation>,
    /// The newest that was forgotten.
    forgotten: Option<u32>,
}

impl Coming {
    pub(super) fn front(&self) -> Option<&Generation> {
        self.generations.front()
    }

    pub(super) fn pop_front(&mut self) -> Option<Generation> {
        self.generations.pop_front()
    }

    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = &Generation> {
        self.generations.iter()
    }

    /// Whether a generation was announced, and forgotten for others. Numbers go up by one, and around.
    pub(super) fn has_forgotten(&self, generation: u32) -> bool {
        let behind = |newest: u32| newest.wrapping_sub(generation).cast_signed() >= 0;
        self.forgotten.is_some_and(behind)
    }
}

pub(super) fn nonsense(place: &Place, why: &str) -> Error {
    Error::new(Kind::Invalid, "join", place.to_string()).because(why.to_owned())
}

/// Takes a message that tells of buffers. The error says what is wrong with it.
pub(super) fn learn(coming: &mut Coming, message: Message, fds: Vec<OwnedFd>) -> std::result::Result<(), String> {
    let Coming { generations: coming, forgotten } = coming;
    match message {
        Message::Format(shape) => {
            if coming.back().is_some_and(|last| !last.is_whole()) {
                return Err("a format follows another before its buffers".to_owned());
            }
            if coming.len() >= COMING {
                *forgotten = coming.pop_front().map(|oldest| oldest.shape.generation);
            }
            coming.push_back(Generation { shape, buffers: Vec::new() });
            Ok(())
        }
        Message::Buffer { generation, index, identity: said } => {
            let last = coming
                .back_mut()
                .filter(|last| last.shape.generation == generation && !last.is_whole());
            let last = last.ok_or("a buffer belongs to no format")?;
            if index as usize != last.buffers.len() || fds.len() != last.shape.lens.len() {
                return Err(format!("buffer {index} of generation {generation} comes out of turn"));
            }
            let buffer = make_buffer(&last.shape, fds).map_err(|error| error.line())?;
            if identity(&buffer).map_err(|error| error.line())? != said {
                return Err(format!("buffer {index} is not what it is said to be"));
            }
            last.buffers.push(buffer);
            Ok(())
        }
        _ => Err("a message is a consumer's, or comes twice".to_owned()),
    }
}

/// A buffer of another process's memory: a dma-buf, whose size is fixed, or a memfd that cannot be made shorter.
fn make_buffer(shape: &Shape, fds: Vec<OwnedFd>) -> Result<Buffer> {
    let memory = |fd: OwnedFd| -> Result<Memory> {
        let about = || "a shared buffer";
        let kind = fstatfs(&fd).context("look at", about)?.filesystem_type();
        if kind == DMA_BUF {
            return Ok(Memory::DmaBuf(DmaBuf::new(fd)?));
        }
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).unwrap_or(0);
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
            let error = Error::new(Kind::Invalid, "use", "a shared buffer");
            return Err(error.because("it is neither a dma-buf nor a memfd that is sealed against shrinking"));
        }
        Ok(Memory::Plain(fd))
    };
    let memory = fds.into_iter().map(memory).collect::<Result<Vec<_>>>()?;
    let lens: Vec<_> = shape
        .lens
        .iter()
        .map(|&len| usize::try_from(len).unwrap_or(usize::MAX))
        .collect();
    Buffer::lent(shape.layout, memory, &lens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;
    use crate::share::fuzz::heap;
    use crate::share::wire::{Reason, Timing};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use proptest::prelude::*;

    fn shape(generation: u32, buffers: u32) -> Shape {
        let layout = crate::format::Layout::packed(Format::parse("GREY").unwrap().0, (64, 64), 1).unwrap();
        let timing = Timing { lease_us: 1000, rate_micro: 0, watchdog_us: 0 };
        Shape { generation, buffers, timing, layout, lens: vec![4096] }
    }

    fn memfd(len: i64, seals: SealFlag) -> OwnedFd {
        let memfd = memfd_create("test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&memfd, len).unwrap();
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        memfd
    }

    fn buffer(generation: u32, index: u32, fd: &OwnedFd) -> Message {
        Message::Buffer { generation, index, identity: nix::sys::stat::fstat(fd).unwrap().st_ino }
    }

    #[test]
    fn buffers_come_in_turn_in_memory_that_stays() {
        let good = || memfd(4096, SealFlag::F_SEAL_SHRINK);
        let mut coming = Coming::default();
        let fd = good();
        assert!(learn(&mut coming, buffer(1, 0, &fd), vec![fd]).is_err(), "of no format");
        learn(&mut coming, Message::Format(shape(1, 2)), vec![]).unwrap();
        for bad in [memfd(4096, SealFlag::empty()), memfd(4095, SealFlag::F_SEAL_SHRINK)] {
            assert!(learn(&mut coming, buffer(1, 0, &bad), vec![bad]).is_err());
        }
        let fd = good();
        assert!(learn(&mut coming, buffer(1, 1, &fd), vec![fd]).is_err(), "out of turn");
        let fd = good();
        assert!(learn(&mut coming, buffer(2, 0, &fd), vec![fd]).is_err(), "of another generation");
        let fd = good();
        assert!(learn(&mut coming, buffer(1, 0, &fd), vec![fd, good()]).is_err(), "with one too many");
        let other = good();
        assert!(learn(&mut coming, buffer(1, 0, &other), vec![good()]).is_err(), "with another's identity");
        for index in 0..2 {
            let fd = good();
            assert!(learn(&mut coming, Message::Format(shape(2, 1)), vec![]).is_err(), "before the last is whole");
            learn(&mut coming, buffer(1, index, &fd), vec![fd]).unwrap();
        }
        assert!(coming.iter().count() == 1 && coming.front().unwrap().is_whole());
        assert!(coming.front().unwrap().buffers.iter().all(Buffer::is_lent));
        learn(&mut coming, Message::Format(shape(2, 1)), vec![]).unwrap();
        let end = Message::End { reason: Reason::Ended, text: String::new() };
        assert!(learn(&mut coming, end, vec![]).is_err());
    }

    /// A source whose format changes again and again before a frame comes: the newest are kept, and it is known which are not.
    #[test]
    fn the_oldest_are_forgotten() {
        let mut coming = Coming::default();
        for generation in (0..100).map(|number| (u32::MAX - 49).wrapping_add(number)) {
            let fd = memfd(4096, SealFlag::F_SEAL_SHRINK);
            learn(&mut coming, Message::Format(shape(generation, 1)), vec![]).unwrap();
            learn(&mut coming, buffer(generation, 0, &fd), vec![fd]).unwrap();
        }
        let kept: Vec<_> = coming.iter().map(|it| it.shape.generation).collect();
        assert_eq!((kept.len(), kept[0], kept[COMING - 1]), (COMING, 50 - COMING as u32, 49));
        assert!(coming.has_forgotten(u32::MAX) && coming.has_forgotten(kept[0] - 1) && !coming.has_forgotten(kept[0]));
        assert!(!Coming::default().has_forgotten(0));
    }

    /// The most that a message takes of the heap, in bytes: the list of generations, when it grows, or the buffers of one.
    const OF_A_MESSAGE: usize = 8 << 10;

    proptest! {
        /// Whatever messages come with whatever descriptors: no more is kept than is meant, and a generation is never more than whole.
        #[test]
        fn a_server_that_says_anything(
            steps in prop::collection::vec((0u8..4, 0u32..3, 0u32..3, 0usize..3, 0u8..4), 1..40)
        ) {
            let mut coming = Coming::default();
            for (step, generation, number, count, kind) in steps {
                let fds: Vec<_> = (0..count).map(|_| match kind {
                    0 => std::fs::File::open("/dev/null").unwrap().into(),
                    1 => memfd(4096, SealFlag::empty()),
                    _ => memfd(4096, SealFlag::F_SEAL_SHRINK),
                }).collect();
                let message = match (step, fds.first()) {
                    (0, _) => Message::Format(shape(generation, number.max(1))),
                    (1, Some(fd)) => buffer(generation, number, fd),
                    (2, _) => Message::Hello { writable: false, name: String::new() },
                    _ => Message::Buffer { generation, index: number, identity: 0 },
                };
                let (_, most) = heap::most(|| learn(&mut coming, message, fds));
                prop_assert!(most <= OF_A_MESSAGE, "it took {most} bytes");
                prop_assert!(coming.iter().count() <= COMING);
                prop_assert!(coming.iter().all(|it| it.buffers.len() <= it.shape.buffers as usize));
                prop_assert!(coming.iter().rev().skip(1).all(Generation::is_whole));
            }
        }
    }
}
