//! The module `vulkan` on a device that is a program's own.

use std::ffi::CStr;
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{Importer, Sink, Source};
use dmaflow::format::Layout;
use dmaflow::vulkan::ash::{self, vk};
use dmaflow::vulkan::{Crop, Gpu, GpuConverter, GpuImporter, RawGpu, Semaphore, Vulkan};

use crate::camera::{format, open};
use crate::gpu::{LAVAPIPE, tested};
use crate::harness::{Outcome, PASSED, Test};
use crate::picture::{Picture, made, noise};
use crate::vgem::Vgem;

const NEEDS: &[&str] = &["vivid", "vgem", "udmabuf", "vulkaninfo"];

/// As long as nothing must happen.
const NOT_YET: Duration = Duration::from_millis(200);

pub const TESTS: &[Test] =
    &[Test { name: "gpu_program::a_device_of_its_own", needs: NEEDS, seconds: 120, run: a_device_of_the_program }];

/// What the validation layer says to the program's own messenger.
static HEARD: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Said of every view with drivers that leave the second list of modifiers empty; see `Messages` in the library.
const FALSE_ONE: &CStr = c"VUID-VkImageViewCreateInfo-None-02273";

unsafe extern "system" fn hear(
    _: vk::DebugUtilsMessageSeverityFlagsEXT,
    _: vk::DebugUtilsMessageTypeFlagsEXT,
    data: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    _: *mut std::ffi::c_void,
) -> vk::Bool32 {
    // SAFETY: valid for the call, its strings null or null-terminated (specification).
    let (id, text) = unsafe {
        let data = &*data;
        (data.message_id_name_as_c_str(), data.message_as_c_str())
    };
    if id != Some(FALSE_ONE) {
        let text = text.map_or_else(String::new, |text| text.to_string_lossy().into_owned());
        HEARD.lock().expect("nobody panics").push(text);
    }
    vk::FALSE
}

/// A program hands its device in, has images, a sink and a conversion on it, and destroys all of it itself, under the eyes of the
/// validation layer.
fn a_device_of_the_program() -> anyhow::Result<Outcome> {
    for asked in [Asked { ycbcr: true, sync_fd: true }, Asked { ycbcr: false, sync_fd: false }] {
        with_a_device(asked)?;
    }
    PASSED
}

/// What the program has made its device with.
#[derive(Clone, Copy, Debug)]
struct Asked {
    ycbcr: bool,
    sync_fd: bool,
}

fn with_a_device(asked: Asked) -> Result<()> {
    let mut camera = open("XR24", (320, 180))?;
    let yuyv = Layout::packed(format("YUYV"), (66, 34), 1)?;
    let words = Layout::packed(format("XR24"), (66, 34), 1)?;
    let (source, target) = (noise(&yuyv, 0x1dea)?, made(&words)?);
    let nv12 = made(&Layout::packed(format("NV12"), (66, 34), 1)?)?;
    let frame = camera.next()?;
    let fds = fs::read_dir("/proc/self/fd")?.count();
    // SAFETY: handles are used with what they were made of, and destroyed once, children first. Nobody else uses the queue.
    unsafe {
        let entry = ash::Entry::load()?;
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_2);
        let (layers, extensions) = ([c"VK_LAYER_KHRONOS_validation".as_ptr()], [ash::ext::debug_utils::NAME.as_ptr()]);
        let info = vk::InstanceCreateInfo::default()
            .application_info(&application)
            .enabled_layer_names(&layers)
            .enabled_extension_names(&extensions);
        let instance = entry.create_instance(&info, None)?;
        let utils = ash::ext::debug_utils::Instance::new(&entry, &instance);
        let severity = vk::DebugUtilsMessageSeverityFlagsEXT::WARNING | vk::DebugUtilsMessageSeverityFlagsEXT::ERROR;
        let info = vk::DebugUtilsMessengerCreateInfoEXT::default()
            .message_severity(severity)
            .message_type(vk::DebugUtilsMessageTypeFlagsEXT::VALIDATION)
            .pfn_user_callback(Some(hear));
        let messenger = utils.create_debug_utils_messenger(&info, None)?;
        let is_tested = |&physical: &vk::PhysicalDevice| {
            let properties = instance.get_physical_device_properties(physical);
            let name = properties
                .device_name_as_c_str()
                .map(|name| name.to_string_lossy().to_lowercase());
            name.is_ok_and(|name| name.contains(&tested().to_lowercase()))
        };
        let physical = instance
            .enumerate_physical_devices()?
            .into_iter()
            .find(is_tested)
            .context("not there")?;
        let fences = if asked.sync_fd { &Gpu::FENCE_EXTENSIONS[..] } else { &[] };
        let names: Vec<_> = Gpu::EXTENSIONS.iter().chain(fences).map(|name| name.as_ptr()).collect();
        let priorities = [1.0];
        let queues = [vk::DeviceQueueCreateInfo::default()
            .queue_family_index(0)
            .queue_priorities(&priorities)];
        let mut feature =
            vk::PhysicalDeviceSamplerYcbcrConversionFeatures::default().sampler_ycbcr_conversion(asked.ycbcr);
        let info = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&names)
            .push_next(&mut feature);
        let device = instance.create_device(physical, &info, None)?;
        let queue = device.get_device_queue(0, 0);
        let raw = RawGpu {
            instance: instance.clone(),
            physical,
            device: device.clone(),
            queue_family: 0,
            queue,
            ycbcr: asked.ycbcr,
            sync_fd: asked.sync_fd,
        };
        let gpu = Gpu::from_raw(raw)?;
        ensure!(gpu.info().is_software() == (tested() == LAVAPIPE) && gpu.messages().is_none(), "{:?}", gpu.info());
        let image = GpuImporter::new(gpu.clone(), vk::ImageUsageFlags::SAMPLED).import(frame.buffer())?;
        let raw = image.into_raw();
        ensure!(raw.image != vk::Image::null() && raw.memory.len() == 1 && raw.size == (320, 180), "{raw:?}");
        // lavapipe has no image of all planes of NV12; but without the feature it is not asked.
        let refusal = GpuImporter::new(gpu.clone(), vk::ImageUsageFlags::SAMPLED).import(&nv12).err();
        let refusal = refusal.filter(|refusal| refusal.why.contains("samplerYcbcrConversion"));
        ensure!(refusal.is_none() == asked.ycbcr, "{asked:?}: {refusal:?}");
        let fence = Semaphore::new(&gpu).err();
        ensure!(fence.is_none() == asked.sync_fd, "{asked:?}: {fence:?}");
        // A sink that reads, and a conversion.
        let mut sink = Vulkan::new(gpu.clone(), true)?;
        sink.join(camera.layout(), camera.rate(), camera.buffers())?;
        sink.inspect(&frame, 0)?;
        sink.present(frame)?.context("not read")?;
        let verdict = sink.verdict().context("no verdict")?;
        ensure!((verdict.checked, verdict.wrong) == (1, 0), "{verdict:?}");
        let mut converter = GpuConverter::new(&gpu, &yuyv, &words, Crop::all((66, 34)))?;
        converter.convert(&source, &target)?;
        let (steps, place) = Picture::of(&source)?.furthest(&target)?;
        ensure!(steps <= 1.001, "{steps:.2} steps at {place}");
        // After a fence, which the CPU waits for where the device takes none; then nothing is left to wait for.
        let (file, signal) = Vgem::open()?.fence()?;
        let signaller = signal.after(NOT_YET);
        let start = Instant::now();
        let done = converter.start(&source, Some(file), &target)?;
        ensure!(asked.sync_fd || done.is_none(), "{asked:?}: {done:?}");
        done.map_or(Ok(()), |fence| fence.wait(Duration::from_secs(8)))?;
        ensure!(start.elapsed() >= NOT_YET, "{asked:?}: it did not wait");
        signaller.join().expect("no panic")?;
        // Nothing of the program's is destroyed with the last of ours.
        drop((sink, converter, gpu));
        device.destroy_image(raw.image, None);
        raw.memory.iter().for_each(|&memory| device.free_memory(memory, None));
        device.destroy_device(None);
        utils.destroy_debug_utils_messenger(messenger, None);
        instance.destroy_instance(None);
    }
    let heard = HEARD.lock().expect("nobody panics");
    ensure!(heard.is_empty(), "the validation layer said: {}", heard.join("\n"));
    ensure!(fs::read_dir("/proc/self/fd")?.count() == fds, "descriptors are left");
    Ok(())
}
