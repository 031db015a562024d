//! What a display shows, by the CRC that vkms computes of it.

use std::fs;
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use dmaflow::kms::Card;
use drm::{Device as _, VblankWaitFlags, VblankWaitTarget};

use crate::modules::debugfs;

/// The CRC of the picture on screen now. Looked at for several refreshes, during which it must stay the same.
///
/// vkms computes CRCs on a work queue that falls behind on a busy machine, and then reports one for all the refreshes that it has missed
/// (`vkms_composer_worker`): also for those of a picture that has left the screen since, and to whoever has opened the file by then. So
/// only refreshes after this call began count, each of which is of the picture that was on screen at that refresh.
pub fn crc() -> Result<u32> {
    let now = Card::find("vkms")?
        .wait_vblank(VblankWaitTarget::Relative(0), VblankWaitFlags::empty(), 0, 0)
        .context("the number of the last vertical blank")?
        .frame();
    let folder = debugfs().context("vkms is not in debugfs")?.join("crtc-0/crc");
    fs::File::options()
        .write(true)
        .open(folder.join("control"))?
        .write_all(b"auto")?;
    let mut data = fs::File::open(folder.join("data"))?;
    let mut seen = Vec::new();
    while seen.len() < 5 {
        let mut line = [0; 128];
        let len = data.read(&mut line)?;
        let text = String::from_utf8_lossy(&line[..len]).into_owned();
        let mut numbers = text
            .split_whitespace()
            .map_while(|word| u32::from_str_radix(word.strip_prefix("0x")?, 16).ok());
        let (refresh, value) = (numbers.next().context("no number")?, numbers.next().context("no CRC")?);
        // The number of the blank that is going on may be counted already or not.
        if refresh.wrapping_sub(now).cast_signed() > 1 {
            seen.push(value);
        }
    }
    ensure!(seen.iter().all(|value| *value == seen[0]), "the picture changes: {seen:x?}");
    Ok(seen[0])
}
