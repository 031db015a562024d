//! What a display shows, by the CRC that vkms computes of it.

use std::fs;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::kms::Card;
use drm::{Device as _, VblankWaitFlags, VblankWaitTarget};

use crate::modules::debugfs;

/// So many refreshes in a row tell that a picture stays.
const STEADY: usize = 5;

/// The CRCs of refreshes from now on.
///
/// vkms computes CRCs on a work queue that falls behind on a busy machine, and then reports one for all the refreshes that it has missed
/// (`vkms_composer_worker`): also for those of a picture that has left the screen since, and to whoever has opened the file by then. So
/// only refreshes that have begun since this is there are told of.
struct Crcs {
    data: fs::File,
    /// The number of the last refresh before.
    before: u32,
}

impl Crcs {
    fn open() -> Result<Crcs> {
        let card = Card::find("vkms")?;
        let last = card.wait_vblank(VblankWaitTarget::Relative(0), VblankWaitFlags::empty(), 0, 0);
        let before = last.context("the number of the last vertical blank")?.frame();
        let folder = debugfs().context("vkms is not in debugfs")?.join("crtc-0/crc");
        fs::File::options()
            .write(true)
            .open(folder.join("control"))?
            .write_all(b"auto")?;
        Ok(Crcs { data: fs::File::open(folder.join("data"))?, before })
    }

    fn next(&mut self) -> Result<u32> {
        loop {
            let mut line = [0; 128];
            let len = self.data.read(&mut line)?;
            let text = String::from_utf8_lossy(&line[..len]).into_owned();
            let mut numbers = text
                .split_whitespace()
                .map_while(|word| u32::from_str_radix(word.strip_prefix("0x")?, 16).ok());
            let (refresh, crc) = (numbers.next().context("no number")?, numbers.next().context("no CRC")?);
            // The number of the blank that is going on may be counted already or not.
            if refresh.wrapping_sub(self.before).cast_signed() > 1 {
                return Ok(crc);
            }
        }
    }
}

/// The CRC of the picture on screen, which must stay for several refreshes.
pub fn crc() -> Result<u32> {
    let mut crcs = Crcs::open()?;
    let seen = (0..STEADY).map(|_| crcs.next()).collect::<Result<Vec<_>>>()?;
    ensure!(seen.iter().all(|crc| *crc == seen[0]), "the picture changes: {seen:x?}");
    Ok(seen[0])
}

/// The CRC of the picture that has come in place of one with the CRC `before`, and must stay for several refreshes.
pub fn changed_from(before: u32) -> Result<u32> {
    /// What the emulated machine may fall behind, on a host that is busy with another such machine.
    const BEHIND: Duration = Duration::from_secs(20);
    let mut crcs = Crcs::open()?;
    let mut seen = vec![before];
    let start = Instant::now();
    while start.elapsed() < BEHIND {
        seen.push(crcs.next()?);
        let steady = seen.iter().rev().take_while(|crc| Some(*crc) == seen.last()).count();
        let now = seen[seen.len() - 1];
        if now != before && steady >= STEADY {
            let others = seen.iter().filter(|crc| ![before, now].contains(crc)).count();
            ensure!(others == 0, "another picture came first: {seen:x?}");
            return Ok(now);
        }
    }
    anyhow::bail!("the picture is still that of before after {} refreshes", seen.len())
}
