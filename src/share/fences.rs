//! Fences that came by the socket, until the frame is looked at that they belong to.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use super::ring::ENTRIES;
use crate::fence::SyncFile;

/// What the kernel calls a sync file (`sync_file_alloc` in drivers/dma-buf/sync_file.c).
const SYNC_FILE: &str = "anon_inode:sync_file";

/// The sync file that a message came with. Whoever sent it may have sent a file that makes each call wait that gets to its file system, as
/// FUSE can; so it is known by its name, which the kernel gives without asking one (`proc_pid_readlink`, and `anon_inodefs_dname`: names of
/// files begin with a slash).
///
/// # Errors
/// Why it is none.
pub(super) fn sync_file(fds: Vec<OwnedFd>) -> Result<SyncFile, String> {
    let [fd]: [OwnedFd; 1] = fds.try_into().map_err(|_| "a fence comes without a descriptor".to_owned())?;
    let name = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    match name {
        Ok(name) if name.as_os_str() == SYNC_FILE => Ok(SyncFile::from(fd)),
        Ok(_) => Err("what comes as a fence is no sync file".to_owned()),
        Err(error) => Err(format!("what comes as a fence cannot be told, as /proc says nothing: {error}")),
    }
}

/// The acquire fences that a server has sent and whose frames were not taken yet.
#[derive(Debug, Default)]
pub(super) struct Announced {
    /// With the positions of their frames, which grow.
    fences: Vec<(u64, SyncFile)>,
    /// The newest that came.
    last: u64,
}

impl Announced {
    /// One more. Those are closed whose frames cannot be taken any more once this one's is there, so that there are [`ENTRIES`] at most.
    ///
    /// # Errors
    /// Why it cannot be meant.
    pub(super) fn add(&mut self, position: u64, fence: SyncFile) -> Result<(), String> {
        if position <= self.last {
            return Err(format!("a fence is of frame {position}, after that of frame {}", self.last));
        }
        self.last = position;
        self.pass(position.saturating_sub(ENTRIES as u64 - 1));
        self.fences.push((position, fence));
        Ok(())
    }

    /// The fence of the frame at this position, if it has come. Those of frames before are closed.
    pub(super) fn take(&mut self, position: u64) -> Option<SyncFile> {
        self.pass(position);
        match self.fences.first() {
            Some(&(first, _)) if first == position => Some(self.fences.remove(0).1),
            _ => None,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.fences.is_empty()
    }

    /// Closes those of frames before this position.
    fn pass(&mut self, position: u64) {
        self.fences.retain(|&(other, _)| other >= position);
    }
}

/// The release fences that a consumer has sent for frames that it has not given back yet.
#[derive(Debug, Default)]
pub(super) struct Returning {
    fences: Vec<(u64, SyncFile)>,
    /// Those that came for frames which had been taken back meanwhile.
    late: u64,
}

impl Returning {
    /// One more. `is_out` tells whether a frame is with the consumer, `end` is the position after the newest frame, and `revoked` how many
    /// frames were taken back from the consumer: for as many as that it may send fences too late.
    ///
    /// # Errors
    /// Why it cannot be meant.
    pub(super) fn add(
        &mut self,
        position: u64,
        fence: SyncFile,
        is_out: impl Fn(u64) -> bool,
        (end, revoked): (u64, u64),
    ) -> Result<(), String> {
        // One whose frame was taken back after it came is nobody's any more.
        let before = self.fences.len();
        self.fences.retain(|&(other, _)| is_out(other));
        self.late += (before - self.fences.len()) as u64;
        if is_out(position) {
            if self.fences.iter().any(|&(other, _)| other == position) {
                return Err(format!("a second fence comes for frame {position}"));
            }
            self.fences.push((position, fence));
            return Ok(());
        }
        self.late += 1;
        if position >= end || self.late > revoked {
            return Err(format!("a fence comes for frame {position}, which it does not have"));
        }
        Ok(())
    }

    /// The fence of the frame at this position, if it has come.
    pub(super) fn take(&mut self, position: u64) -> Option<SyncFile> {
        let index = self.fences.iter().position(|&(other, _)| other == position)?;
        Some(self.fences.swap_remove(index).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use nix::unistd::{pipe2, read};
    use proptest::prelude::*;
    use std::time::{Duration, Instant};

    /// Something to close, for each of these positions, and a look at whether it is closed: a pipe is open as a fence is.
    fn fence() -> (SyncFile, impl Fn() -> bool) {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        (SyncFile::from(writer), move || read(&reader, &mut [0]) == Ok(0))
    }

    /// How many of them are open: so many as are `kept`, at once or in a moment. Who looks at the descriptors of this process by /proc, as
    /// `dmaflow bufs` does, has each of them for that long.
    fn open(all: &[impl Fn() -> bool], kept: usize) -> usize {
        let open = || all.iter().filter(|closed| !closed()).count();
        let end = Instant::now() + Duration::from_secs(5);
        while open() != kept && Instant::now() < end {
            std::thread::yield_now();
        }
        open()
    }

    #[test]
    fn what_is_no_sync_file_is_refused_and_closed() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        assert!(sync_file(vec![writer]).unwrap_err().contains("no sync file"));
        assert_eq!(read(&reader, &mut [0]), Ok(0));
        let event = nix::sys::eventfd::EventFd::new().unwrap();
        assert!(sync_file(vec![event.into()]).unwrap_err().contains("no sync file"));
        assert!(sync_file(Vec::new()).is_err());
        // A file of that name is no sync file either.
        let path = std::env::temp_dir().join("anon_inode:sync_file");
        let file = fs::File::create(&path).unwrap();
        fs::remove_file(path).unwrap();
        assert!(sync_file(vec![file.into()]).is_err());
    }

    #[test]
    fn fences_of_frames_that_are_passed_over_are_closed() {
        let mut coming = Announced::default();
        let closed: Vec<_> = [3, 4, 7]
            .into_iter()
            .map(|position| {
                let (fence, closed) = fence();
                coming.add(position, fence).unwrap();
                closed
            })
            .collect();
        let states = || closed.iter().map(|closed| closed()).collect::<Vec<_>>();
        assert!(coming.take(2).is_none() && states() == [false; 3]);
        assert!(coming.take(4).is_some());
        assert_eq!(states(), [true, true, false]);
        assert!(coming.take(4).is_none() && coming.take(5).is_none());
        assert!(coming.add(7, fence().0).is_err() && coming.add(1, fence().0).is_err());
        coming.pass(7);
        assert!(!closed[2]());
        coming.pass(8);
        assert!(closed[2]() && coming.fences.is_empty());
    }

    #[test]
    fn a_late_fence_comes_for_each_frame_that_was_taken_back_and_no_more() {
        let mut returning = Returning::default();
        let add = |returning: &mut Returning, position, out: &[u64], revoked| {
            let (fence, closed) = fence();
            (
                returning
                    .add(position, fence, |position| out.contains(&position), (10, revoked))
                    .is_ok(),
                closed(),
            )
        };
        assert_eq!(add(&mut returning, 4, &[4, 5], 0), (true, false));
        assert_eq!(add(&mut returning, 4, &[4, 5], 0), (false, true), "twice");
        // 4 was taken back: its fence is closed with the next, and so is one of a frame that was, too.
        assert_eq!(add(&mut returning, 5, &[5], 1), (true, false));
        assert_eq!(add(&mut returning, 3, &[5], 2), (true, true));
        assert_eq!(add(&mut returning, 3, &[5], 2), (false, true), "more than were taken back");
        assert_eq!(add(&mut returning, 10, &[5], 9), (false, true), "of a frame to come");
        assert!(returning.take(4).is_none() && returning.take(5).is_some() && returning.take(5).is_none());
    }

    proptest! {
        /// Whatever fences a server announces: no more are kept than a ring has entries, and all others are closed.
        #[test]
        fn a_server_that_sends_any_fence(steps in prop::collection::vec((any::<bool>(), 0u64..60), 1..60)) {
            let (mut coming, mut all) = (Announced::default(), Vec::new());
            for (add, position) in steps {
                match add {
                    true => {
                        let (fence, closed) = fence();
                        let _ = coming.add(position, fence);
                        all.push(closed);
                    }
                    false => drop(coming.take(position)),
                }
                prop_assert!(coming.fences.len() <= ENTRIES && coming.fences.is_sorted_by_key(|&(position, _)| position));
                prop_assert_eq!(open(&all, coming.fences.len()), coming.fences.len());
            }
        }

        /// Whatever fences a consumer sends: no more are kept than it has frames.
        #[test]
        fn a_consumer_that_sends_any_fence(
            steps in prop::collection::vec((0u8..3, 0u64..20, any::<u32>()), 1..60)
        ) {
            let (mut returning, mut all) = (Returning::default(), Vec::new());
            for (step, position, out) in steps {
                let is_out = |position: u64| position < 16 && out & (1 << position) != 0;
                match step {
                    0 | 1 => {
                        let (fence, closed) = fence();
                        let added = returning.add(position, fence, is_out, (16, u64::from(out >> 28)));
                        all.push(closed);
                        prop_assert!(returning.fences.iter().all(|&(position, _)| is_out(position)));
                        prop_assert!(position < 16 || added.is_err());
                    }
                    _ => drop(returning.take(position)),
                }
                prop_assert!(returning.fences.len() <= 16);
                prop_assert_eq!(open(&all, returning.fences.len()), returning.fences.len());
            }
        }
    }
}
