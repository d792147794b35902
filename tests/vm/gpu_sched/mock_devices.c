// SPDX-License-Identifier: GPL-2.0-only
/*
 * Devices without hardware, which can be opened and nothing else: character devices that are called as those of NVIDIA's
 * driver (major 195 nvidia, and nvidia-uvm; no files of theirs), and where the kernel has the class accel, an accelerator
 * of the driver mock_accel.
 */
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/platform_device.h>

#if IS_ENABLED(CONFIG_DRM_ACCEL) && defined(MOCK_DRM_DEV_ALLOC)
#define ACCEL
#include <drm/drm_accel.h>
#include <drm/drm_drv.h>
#include <drm/drm_file.h>
#include <drm/drm_gem.h>
#include <drm/drm_ioctl.h>
#endif

#define NVIDIA_MAJOR 195

static int open_nothing(struct inode *inode, struct file *filp)
{
	return 0;
}

static const struct file_operations nothing = {
	.owner = THIS_MODULE,
	.open = open_nothing,
};

#ifdef ACCEL
DEFINE_DRM_ACCEL_FOPS(accel_files);

static const struct drm_driver accel = {
	.driver_features = DRIVER_COMPUTE_ACCEL | DRIVER_GEM,
	.fops = &accel_files,
	.name = "mock_accel",
	.desc = "An accelerator without hardware",
	.major = 1,
};

static int accel_probe(struct platform_device *parent)
{
	struct drm_device *drm = drm_dev_alloc(&accel, &parent->dev);
	int err;

	if (IS_ERR(drm))
		return PTR_ERR(drm);
	err = drm_dev_register(drm, 0);
	if (err)
		drm_dev_put(drm);
	else
		platform_set_drvdata(parent, drm);
	return err;
}

static struct platform_driver driver = {
	.probe = accel_probe,
	.driver = { .name = "mock_accel" },
};

static struct platform_device *device;

static int accel_init(void)
{
	int err = platform_driver_register(&driver);

	if (err)
		return err;
	device = platform_device_register_simple("mock_accel", PLATFORM_DEVID_NONE, NULL, 0);
	if (!IS_ERR(device))
		return 0;
	platform_driver_unregister(&driver);
	return PTR_ERR(device);
}

static void accel_exit(void)
{
	struct drm_device *drm = platform_get_drvdata(device);

	if (drm) {
		drm_dev_unplug(drm);
		drm_dev_put(drm);
	}
	platform_device_unregister(device);
	platform_driver_unregister(&driver);
}
#else
static int accel_init(void)
{
	return 0;
}

static void accel_exit(void)
{
}
#endif

static int uvm;

static int __init mock_init(void)
{
	int err = register_chrdev(NVIDIA_MAJOR, "nvidia", &nothing);

	if (err)
		return err;
	uvm = register_chrdev(0, "nvidia-uvm", &nothing);
	if (uvm < 0) {
		err = uvm;
		goto no_uvm;
	}
	err = accel_init();
	if (!err)
		return 0;
	unregister_chrdev(uvm, "nvidia-uvm");
no_uvm:
	unregister_chrdev(NVIDIA_MAJOR, "nvidia");
	return err;
}

static void __exit mock_exit(void)
{
	accel_exit();
	unregister_chrdev(uvm, "nvidia-uvm");
	unregister_chrdev(NVIDIA_MAJOR, "nvidia");
}

module_init(mock_init);
module_exit(mock_exit);
MODULE_DESCRIPTION("Devices of GPUs and accelerators without hardware, for tests of who opens them");
MODULE_LICENSE("GPL");
